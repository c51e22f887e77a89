from __future__ import annotations

import json
from pathlib import Path

import pytest

from garrison_agent.api.cache_check import CacheCheck, FileCheck, FileOutcome
from garrison_agent.api.commands import CheckCache, Command
from garrison_agent.cli.main import main
from tests.unit.agent_cli.conftest import Serve


def found(outcome: FileOutcome, detail: str = "") -> FileCheck:
    return FileCheck(
        package="smollm2:1.0.0", variant="q4", path="model.gguf", size_bytes=2**20, outcome=outcome, detail=detail
    )


def ended(*files: FileCheck) -> CacheCheck:
    check = CacheCheck()
    check.judged(list(files))
    check.end()
    return check


@pytest.mark.parametrize(
    ("outcome", "status", "says"),
    [
        ("ok", 0, "1 files, 1.0 MiB read: all ok"),
        ("repaired", 0, "repaired"),
        ("damaged", 1, "cache verify --repair"),
        ("missing", 1, "cache verify --repair"),
    ],
)
def test_the_exit_status_says_whether_all_is_well_now(
    serve: Serve, config: Path, capsys: pytest.CaptureFixture[str], outcome: FileOutcome, status: int, says: str
) -> None:
    owner = serve(lambda _command: ended(found(outcome)))
    assert main(["cache", "verify", "--config", str(config)]) == status
    assert says in capsys.readouterr().out
    assert owner.commands == [CheckCache(None, repair=False)]


def test_details_and_json(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = serve(lambda _command: ended(found("damaged", "not repaired: no network (source.unreachable)")))
    assert main(["cache", "verify", "smollm2", "--repair", "--config", str(config)]) == 1
    out = capsys.readouterr().out
    assert "not repaired: no network" in out
    assert "tried again before its next load" in out
    assert owner.commands == [CheckCache("smollm2", repair=True)]
    assert main(["cache", "verify", "-o", "json", "--config", str(config)]) == 1
    assert json.loads(capsys.readouterr().out)["files"][0]["outcome"] == "damaged"


def test_a_check_under_way_is_followed_to_its_end(
    serve: Serve, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = CacheCheck()
    check.at("reading", "model.gguf", 5, 10)
    polls: list[float] = []

    def look(seconds: float) -> None:
        polls.append(seconds)
        check.judged([found("ok")])
        check.end()

    def begin(command: Command) -> object:
        return check

    serve(begin)
    monkeypatch.setattr("garrison_agent.cli.cache.time.sleep", look)
    assert main(["cache", "verify", "--config", str(config)]) == 0
    assert len(polls) == 1


def test_ctrl_c_ends_the_check_as_well(serve: Serve, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = CacheCheck()

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    serve(lambda _command: check)
    monkeypatch.setattr("garrison_agent.cli.cache.time.sleep", interrupt)
    assert main(["cache", "verify", "--config", str(config)]) == 130
    assert check.cancelled()


def test_an_empty_board(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(lambda _command: ended())
    assert main(["cache", "verify", "--config", str(config)]) == 0
    assert capsys.readouterr().out == "no package is installed\n"
