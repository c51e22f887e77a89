from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from garrison_controller.cli.device import summary_line
from garrison_controller.cli.output import Output, OutputFormat, cell, counted, print_error, size
from garrison_controller.cli.times import duration_text, moment, parse_duration, utc_text
from garrison_protocol.errors import InvalidError, RefusedError

ROWS = [{"id": "edge-1", "labels": {"site": "x"}, "online": True}, {"id": "[red]edge-2", "labels": {}, "online": False}]
COLUMNS = {"id": "NAME", "labels": "LABELS", "online": "ONLINE"}


def test_a_table_shows_each_row_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.TABLE).table(COLUMNS, ROWS, footer="2 boards")
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines == [
        ["NAME", "LABELS", "ONLINE"],
        ["edge-1", "site=x", "yes"],
        ["[red]edge-2", "-", "no"],
        ["2", "boards"],
    ]


def test_json_is_the_whole_document(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.JSON).table(COLUMNS, ROWS, document={"devices": ROWS}, footer="2 boards")
    assert json.loads(capsys.readouterr().out) == {"devices": ROWS}


def test_a_secret_stands_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.TABLE).secret("Shown only now:", "s3cret", {"token": "s3cret"})
    captured = capsys.readouterr()
    assert captured.out == "s3cret\n"
    assert "Shown only now:" in captured.err


def test_an_error_says_what_and_what_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(RefusedError("device.revoked", "edge-1 is revoked", hint="enrol it anew")) == 6
    assert capsys.readouterr().err == "error: edge-1 is revoked (device.revoked)\nhint: enrol it anew\n"
    print_error(RefusedError("device.revoked", "edge-1 is revoked"))
    assert "\nhint: see device.revoked in docs/errors.md" in capsys.readouterr().err


def test_a_number_and_its_noun() -> None:
    assert [counted(number, "board") for number in (0, 1, 2)] == ["0 boards", "1 board", "2 boards"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (False, "no"), (1.25, "1.2"), ([], "-"), (["a", "b"], "a, b")]
)
def test_cells(value: object, text: str) -> None:
    assert cell(value) == text


def test_durations() -> None:
    assert [parse_duration(text).total_seconds() for text in ("90s", "15m", "2h", "7d", "1w")] == [
        90,
        900,
        7200,
        604800,
        604800,
    ]
    for text in ("", "2", "h", "-1h", "1y", "2 h"):
        with pytest.raises(InvalidError, match=r"usage\.duration_malformed"):
            parse_duration(text)
    assert utc_text(0) == "1970-01-01 00:00:00"


def test_the_summary_of_samples_counts_what_was_taken_offline() -> None:
    rows: list[dict[str, Any]] = [
        {"online": True, "completion_tokens": 10, "tps_milli": 20_000},
        {"online": False, "completion_tokens": 5, "tps_milli": 30_000},
        {"online": False},
    ]
    assert summary_line(rows) == "3 rows, 2 taken offline, 15 tokens, mean 25.0 tokens/s"
    assert summary_line([]) == "0 rows, 0 taken offline, 0 tokens, mean - tokens/s"


WIDE = [{"id": "smollm2-135m-instruct:1.0.0", "by": "piet", "why": "group canary: 1 of 1 boards failed", "n": 7}]
WIDE_COLUMNS = {"id": "MODEL", "by": "PUBLISHED BY", "why": "REASON", "n": "BOARDS"}


def _printed(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, terminal: bool
) -> tuple[list[str], str]:
    output = Output(OutputFormat.TABLE)
    monkeypatch.setattr(output, "console", Console(width=width, force_terminal=terminal, color_system=None))
    output.table(WIDE_COLUMNS, WIDE, prose={"why"}, spare=("by",))
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_a_row_that_is_piped_stays_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, remark = _printed(20, monkeypatch, capsys, terminal=False)
    assert len(lines) == 2
    assert all(value in lines[1] for value in ("smollm2-135m-instruct:1.0.0", "piet", "group canary: 1 of 1 boards"))
    assert remark == ""


def test_a_narrow_terminal_wraps_prose_then_drops_spare_columns_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, remark = _printed(70, monkeypatch, capsys, terminal=True)
    assert "PUBLISHED BY" in lines[0]
    assert len(lines) > 2
    assert remark == ""
    lines, remark = _printed(60, monkeypatch, capsys, terminal=True)
    assert "PUBLISHED BY" not in lines[0]
    assert "smollm2-135m-instruct:1.0.0" in lines[1]
    assert max(map(len, lines)) <= 60
    assert "PUBLISHED BY: left out" in remark


@pytest.mark.parametrize(
    ("number", "text"), [(512, "0.5 KiB"), (3_163_737, "3.0 MiB"), (98_362_432, "94 MiB"), (1_503_238_554, "1.4 GiB")]
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


def test_times_and_durations_for_people() -> None:
    assert moment("2026-11-24T10:19:26.597979+02:00") == "2026-11-24 08:19:26"
    assert moment(None) is None
    assert [duration_text(seconds) for seconds in (5, 90, 5400, 7200, 86400)] == ["5 s", "90 s", "90 min", "2 h", "1 d"]
