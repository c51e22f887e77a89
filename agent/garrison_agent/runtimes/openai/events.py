"""OpenAI's server-sent events: whole ones, and the fixed parts around the text of those that come for every token."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii
from typing import Any

DONE = b"data: [DONE]\n\n"
TEXT = "@text@"
"""Stands for the text in the value from which a frame is made."""


def event(value: object) -> bytes:
    """Return one event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def frame(value: object) -> tuple[bytes, bytes]:
    """Return what stands before and behind the quoted text in each event like ``value``, which holds ``TEXT`` last."""
    head, _, tail = event(value).rpartition(json.dumps(TEXT).encode())
    return head, tail


def framed(around: tuple[bytes, bytes], text: str) -> bytes:
    """Return the event of a ``frame`` that says ``text``. All that is encoded for a token is its text."""
    return around[0] + encode_basestring_ascii(text).encode("ascii") + around[1]


def token_text(piece: bytes) -> str:
    """Return a token as clients show it; half a character becomes a replacement mark."""
    return piece.decode("utf-8", "replace")


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold: OpenAI writes -9999 for what is impossible."""
    return max(logprob, -9999.0) if logprob == logprob else -9999.0  # noqa: PLR0124 - only NaN differs from itself


Json = dict[str, Any]
