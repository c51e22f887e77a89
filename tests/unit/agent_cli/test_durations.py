from __future__ import annotations

import pytest

from garrison_agent.cli.durations import parse_keep_alive
from garrison_protocol.errors import InvalidError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("90", 90), ("1.5h", 5400), ("0", 0), ("-1", -1), ("-5m", -1), ("250ms", 0.25)],
)
def test_durations_as_ollama_has_them(text: str, seconds: float) -> None:
    assert parse_keep_alive(text) == seconds


def test_none_stays_none() -> None:
    assert parse_keep_alive(None) is None


@pytest.mark.parametrize("text", ["", "5 m", "m", "-", "3x", "nan", "inf", "1e9", "-x", "5m3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidError, match=r"cli\.duration_invalid"):
        parse_keep_alive(text)
