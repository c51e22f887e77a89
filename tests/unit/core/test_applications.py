from __future__ import annotations

import pytest

from garrison_agent.core.applications import Application, ApplicationTable, check_limits, check_name, is_key, key_digest
from garrison_protocol.errors import InvalidError

KEY = "gsk_" + "ab" * 32


def make(name: str = "camera", key: str = KEY, **changes: object) -> Application:
    return Application(name, key_digest(key), 0, **changes)  # type: ignore[arg-type] # limits by name


def test_a_key_finds_its_application_alone() -> None:
    table = ApplicationTable().added(make()).added(make("bench", "gsk_" + "cd" * 32))
    assert [one.name for one in table.applications] == ["bench", "camera"]
    found = table.of_key(KEY)
    assert found is not None
    assert found.name == "camera"
    for other in ("", "gsk_", KEY[:-1], KEY + "0", KEY.upper(), key_digest(KEY), "gsk_\udcff"):
        assert table.of_key(other) is None
    assert table.removed("camera").of_key(KEY) is None


def test_an_application_without_models_may_use_all() -> None:
    assert make().may_use(("chat", "smollm2:1.0", "smollm2"))
    limited = make(models=frozenset({"smollm2"}))
    assert limited.may_use(("chat", "smollm2:1.0", "smollm2"))
    assert not limited.may_use(("chat", "smollm2:1.0", "qwen"))


def test_tokens_are_charged_where_they_are_limited() -> None:
    table = ApplicationTable().added(make(tokens_per_min=100)).added(make("free", "gsk_1"))
    assert table.spent("free", 50, 0.0) is table
    assert table.spent("nobody", 50, 0.0) is table
    assert table.spent("camera", 0, 0.0) is table
    spent = table.spent("camera", 30, 0.0).spent("camera", 90, 0.0)
    assert spent.tokens["camera"].left(0.0) == -20
    assert table.tokens == {}  # who still reads the old table is not disturbed
    assert spent.removed("camera").tokens == {}
    assert spent.added(make("late", "gsk_2")).tokens == spent.tokens


@pytest.mark.parametrize("name", ["camera", "a", "9", "a-b.c_d", "x" * 63])
def test_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "local", "uid:0", "Camera", "-a", ".a", "a b", "a\n", "x" * 64, "é", "a/b"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(InvalidError, match=r"app\.name_malformed"):
        check_name(name)


def test_limits_are_counts() -> None:
    check_limits(rate=0, tokens=5)
    for value in (-1, 10**10):
        with pytest.raises(InvalidError) as caught:
            check_limits(rate=value)
        assert caught.value.fields["limit"] == "rate"


def test_only_keys_of_our_form_are_ours() -> None:
    assert is_key(KEY)
    assert is_key("gsk_anything")
    for placeholder in ("", "none", "ollama", "sk-123", "EMPTY", "GSK_1"):
        assert not is_key(placeholder)
