from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from garrison_agent.cli import logs
from garrison_agent.cli.logs import journal_command
from garrison_agent.cli.main import main


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"output": "table", "since": None, "lines": None, "follow": False, **changes})


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({}, ["--lines=50"]),
        ({"lines": 7, "follow": True}, ["--lines=7", "--follow"]),
        ({"since": "-1h"}, ["--since=-1h"]),
        ({"since": "today", "lines": 3}, ["--since=today", "--lines=3"]),
        ({"output": "json"}, ["--output", "json", "--lines=50"]),
    ],
)
def test_what_journalctl_is_asked(given: dict[str, object], ends: list[str]) -> None:
    assert journal_command(options(**given)) == ["journalctl", "--unit", "garrison-agent", "--no-pager", *ends]


def test_without_systemd_it_says_where_logs_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "_RUNNING", tmp_path / "none")
    assert main(["logs"]) == 4
    err = capsys.readouterr().err
    assert "cli.no_journal" in err
    assert "by hand" in err
