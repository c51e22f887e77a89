from __future__ import annotations

import pytest

from garrison_agent.api.relay import whole_events

LONG = b"x" * 300_000


@pytest.mark.parametrize(
    ("data", "whole", "tail"),
    [
        (b"", b"", b""),
        (b"data: 1\n\n", b"data: 1\n\n", b""),
        (b"data: 1\n\ndata: 2\n\n", b"data: 1\n\ndata: 2\n\n", b""),
        (b"data: 1\n\ndata: 2\n", b"data: 1\n\n", b"data: 2\n"),
        (b"data: 1\n", b"", b"data: 1\n"),
        (b"\n\n", b"\n\n", b""),
        (b"data: 1\r\n\r\ndata: 2\r\n\r", b"data: 1\r\n\r\n", b"data: 2\r\n\r"),
        (LONG, LONG, b""),  # too long to hold back
    ],
)
def test_half_events_wait_for_their_rest(data: bytes, whole: bytes, tail: bytes) -> None:
    assert whole_events(data) == (whole, tail)


@pytest.mark.parametrize(
    ("data", "whole", "tail"),
    [
        (b'{"a":1}\n{"b"', b'{"a":1}\n', b'{"b"'),
        (b'{"a":1}\n{"b":2}\n', b'{"a":1}\n{"b":2}\n', b""),
        (b'{"a', b"", b'{"a'),
        (LONG, LONG, b""),
    ],
)
def test_half_lines_wait_for_their_rest(data: bytes, whole: bytes, tail: bytes) -> None:
    assert whole_events(data, b"\n") == (whole, tail)
