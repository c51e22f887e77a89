from __future__ import annotations

import math

import pytest

from garrison_agent.api.errors import BadRequestError, ollama_body
from garrison_agent.api.ollama import parameter_size, parse_keep_alive
from garrison_protocol.errors import NotFoundError, UnavailableError


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0.0),
        ("0", 0.0),
        ("0s", 0.0),
        (5, 5.0),
        (2.5, 2.5),
        ("300", 300.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("500ms", 0.5),
        (-1, -1.0),
        ("-1", -1.0),
        ("-1m", -1.0),
        (10**400, -1.0),
        (-(10**400), -1.0),
        (1e300, -1.0),
        (math.inf, -1.0),
        ("99999999h", -1.0),
        ("+5m", 300.0),
    ],
)
def test_keep_alive_is_seconds_or_a_duration(value: object, seconds: float | None) -> None:
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize(
    "value", ["", "soon", "5 m", "m", "5x", "--1", "1h-30m", "\u0665", True, [], {}, math.nan, "nan", "1e5", "5m" * 40]
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(BadRequestError, match=r"api\.keep_alive_malformed"):
        parse_keep_alive(value)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (7, "7"), (1_500, "1.50K"), (134_515_008, "134.52M"), (7_241_732_096, "7.2B"), (8_030_261_248, "8.0B")],
)
def test_parameters_are_counted_as_ollama_does(count: int, text: str) -> None:
    assert parameter_size(count) == text


def test_an_unknown_model_is_reported_in_ollamas_words() -> None:
    assert ollama_body(NotFoundError("model.unknown", "no", hint="known", name="x")) == {"error": "model 'x' not found"}
    busy = UnavailableError("api.busy", "too many", hint="retry", retryable=True)
    assert ollama_body(busy) == {"error": "too many (retry)"}
