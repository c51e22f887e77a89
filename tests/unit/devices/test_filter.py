from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_controller.devices.filter import DeviceFacts, matches
from garrison_protocol.errors import InvalidError

BOARD = DeviceFacts("edge-1", "/eu/plant1/", {"site": "berlin", "line": "2"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("*", True),
        ("name=edge-1", True),
        ("name=edge-10", False),
        ("name=edge-*", True),
        ("name=*", True),
        ("name!=edge-1", False),
        ("name!=edge-2", True),
        ("name!=edge-*", False),
        ("group=/eu/plant1/", True),
        ("group=/eu/", False),
        ("group=/eu/*", True),
        ("group=/eu/*, label.site=berlin", True),
        ("group=/eu/*,label.site=paris", False),
        ("label.site=ber*", True),
        ("label.none=x", False),
        ("label.none!=x", True),
        ("label.none=*", False),
        ("name=edge-1,name!=edge-1", False),
    ],
)
def test_conditions(text: str, expected: bool) -> None:
    assert matches(BOARD, text) is expected


@pytest.mark.parametrize(
    "text", ["edge-1", "id=edge-1", "name", "name==x", "name=a*b", "name=x,", ",", "label=x", "label.=x", "a" * 2000]
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(InvalidError, match=r"filter\.malformed"):
        matches(BOARD, text)


@given(st.text(max_size=60))
def test_any_text_is_answered_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidError):
        assert matches(BOARD, text) in {True, False}


@given(st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True))
def test_a_condition_and_its_negation_never_both_hold(name: str) -> None:
    assert matches(BOARD, f"name={name}*") != matches(BOARD, f"name!={name}*")
