from __future__ import annotations

import json
from pathlib import Path

import pytest

from garrison_agent.api.commands import AddApp, AddedApp, AppView, Command, ListApps, RemoveApp, ShowApp
from garrison_agent.cli.main import main
from garrison_protocol.errors import ConflictError
from tests.unit.agent_cli.conftest import Serve

VIEW = AppView(
    name="camera",
    models=["magika", "smollm2"],
    requests_per_min=60,
    tokens_per_min=0,
    concurrent=2,
    admin=False,
    created_at=1_700_000_000,
    requests=12,
    tokens=3456,
)
KEY = "gsk_" + "ab" * 32


def answer(command: Command) -> object:
    match command:
        case AddApp("taken"):
            return ConflictError("app.exists", "there is an application taken already", hint="remove it first")
        case AddApp():
            return AddedApp(**VIEW, key=KEY)
        case ListApps():
            return [VIEW]
        case ShowApp() | RemoveApp():
            return VIEW
        case _:
            raise AssertionError(command)


def run(config: Path, *words: str) -> int:
    return main([*words, "--config", str(config)])


def test_a_key_is_shown_once_with_what_it_opens(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = serve(answer)
    words = ["--models", "smollm2, magika", "--rate", "60", "--tokens-per-min", "500", "--concurrent", "2", "--admin"]
    assert run(config, "app", "add", "camera", *words) == 0
    assert owner.commands == [AddApp("camera", ("smollm2", "magika"), 60, 500, 2, admin=True)]
    out = capsys.readouterr().out
    assert out.count(KEY) == 1
    assert "not shown again" in out
    assert run(config, "app", "add", "camera", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["key"] == KEY
    assert owner.commands[-1] == AddApp("camera")


def test_lists_and_removals(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = serve(answer)
    assert run(config, "app", "list") == 0
    heads, row = capsys.readouterr().out.splitlines()
    assert heads.split()[:3] == ["NAME", "MODELS", "REQ/MIN"]
    assert row.split() == ["camera", "magika,smollm2", "60", "-", "2", "no", "12", "3456"]
    assert run(config, "app", "show", "camera") == 0
    assert "no limit" in capsys.readouterr().out
    assert run(config, "app", "remove", "camera", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == VIEW
    assert owner.commands[-2:] == [ShowApp("camera"), RemoveApp("camera")]


def test_what_cannot_be_added(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = serve(answer)
    assert run(config, "app", "add", "taken") == 5
    for words in (["--rate", "0"], ["--rate", "many"], ["--models", ","]):
        with pytest.raises(SystemExit):
            run(config, "app", "add", "camera", *words)
    assert len(owner.commands) == 1
    assert "app.exists" in capsys.readouterr().err
