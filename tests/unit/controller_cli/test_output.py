from __future__ import annotations

import json
from typing import Any

import pytest

from garrison_controller.cli.device import summary_line
from garrison_controller.cli.output import Output, OutputFormat, cell, print_error
from garrison_controller.cli.times import parse_duration, utc_text
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
    assert "\nhint: " in capsys.readouterr().err


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
