from __future__ import annotations

from pathlib import Path

from garrison_agent.api.routes import RouteTable
from tests.fakes.local_owner import make_route


def test_an_alias_wins_over_another_models_name() -> None:
    by_alias = make_route("smollm2", name="other")
    by_name = make_route("chat", name="smollm2", socket=Path("1.sock"))
    table = RouteTable((by_name, by_alias))
    assert table.find("smollm2") is by_alias
    assert table.find("smollm2:1.0.0") is by_name


def test_of_two_versions_a_loaded_one_answers_to_the_package_name() -> None:
    idle, loaded = make_route("old"), make_route("new", version="2.0.0", socket=Path("1.sock"))
    table = RouteTable((idle, loaded))
    assert table.find("smollm2") is loaded
    assert table.find("smollm2:1.0.0") is idle


def test_names_are_exact() -> None:
    table = RouteTable((make_route(),))
    for name in ("", "Chat", "chat ", "smollm2:", "smollm2:1.0"):
        assert table.find(name) is None
    assert table.names == ["chat", "smollm2:1.0.0"]
    assert RouteTable().find("chat") is None
