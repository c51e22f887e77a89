from __future__ import annotations

import json
import os
import sys

import pytest

from garrison_agent.cli.output import duration, fold, moment, pairs, print_error, size, table
from garrison_protocol.errors import NotFoundError


def test_tables_are_aligned_and_end_without_spaces() -> None:
    text = table(["NAME", "SIZE", "LOADED"], [("a", 5, True), ("long name", 12345, None)], right=["SIZE"])
    assert text.splitlines() == [
        "NAME        SIZE  LOADED",
        "a              5  yes",
        "long name  12345  -",
    ]
    assert pairs([("a", "x"), ("long", False), ("b", "")]) == "a     x\nlong  no\nb     -"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (-5, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min 59 s"), (3600, "1 h"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_unit_between_that_is_zero_ends_the_duration() -> None:
    assert duration(86400 + 5) == "1 d"


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0.0 MiB"), (943718, "0.9 MiB"), (91226112, "87 MiB"), (1503238553, "1.4 GiB")]
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert size(size_bytes) == text


def test_moments() -> None:
    assert moment(None) is None
    text = moment(1_700_000_000)
    assert text is not None
    assert text.startswith("2023-11-1")


def test_text_is_folded_for_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "ok    " + "word " * 12 + "a" * 40
    assert fold(text, " " * 6) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 24)))
    lines = fold(text, " " * 6).splitlines()
    assert [line[:6] for line in lines] == ["ok    ", *[" " * 6] * (len(lines) - 1)]
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())  # a digest stays whole


def test_errors_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = NotFoundError("model.unknown", "no model is called 'x'", hint="known here: chat", name="x")
    print_error(error, "table")
    print_error(error, "json")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:2] == ["error: no model is called 'x' (model.unknown)", "hint: known here: chat"]
    assert json.loads(lines[2]) == {"error": error.to_dict()}
