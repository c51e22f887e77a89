"""What an upstream's answer says of its tokens, read while it passes; nothing of its text is kept.

Fields and events: OpenAI's API reference, "Chat", "Completions", "Responses", and "Embeddings". What is not as they say
is passed on and not counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from garrison_agent.api.errors import http_status
from garrison_agent.core.health import CLIENT_GONE
from garrison_agent.runtimes.status import RequestKind, RequestRecord
from garrison_protocol.errors import GarrisonError

CLIENT_LEFT = 499
TAIL_BYTES = 64 * 1024
"""``usage`` stands near the end of an answer that is no stream; the rest of it is not held."""
MAX_TOKENS = 10**9
MAX_SPEED = 1e9
"""Tokens a second. An upstream says what it likes; what is recorded has the bounds of ``RequestRecord``."""
_KINDS: dict[str, RequestKind] = {"/v1/completions": "completion", "/v1/embeddings": "embedding"}
_PIECES = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")


class AnswerReader:
    """Reads one answer. ``hide_usage``: the client did not ask for the event that the board asked for."""

    def __init__(self, path: str, app: str, *, hide_usage: bool) -> None:
        self._kind = _KINDS.get(path, "chat")
        self._app = app
        self._hide_usage = hide_usage
        self._began_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._pieces = 0
        self._usage: dict[str, Any] | None = None
        self._tail = b""

    def read(self, data: bytes, events: bool) -> bytes:
        """Take in a part of the body, and return what of it the client gets. ``events``: whole ones of a stream."""
        if not events:
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            return data
        return b"".join(event for event in _split(data) if self._is_for_the_client(event))

    def to_record(self, failure: GarrisonError | None = None, *, left: bool = False) -> RequestRecord:
        """Return what happened: the answer came to its end, failed, or its client went away."""
        if left:
            return self._record(CLIENT_LEFT, CLIENT_GONE)
        if failure is not None:
            return self._record(http_status(failure), failure.code)
        return self._record(200, None)

    def to_refusal(self, status: int) -> RequestRecord:
        """Return what happened where the upstream refused the request with ``status``."""
        return self._record(status, "upstream.refused")

    def _record(self, status: int, code: str | None) -> RequestRecord:
        usage = self._usage or _usage_at_end(self._tail)
        completion = _count(usage, "completion_tokens", "output_tokens")
        completion = self._pieces if completion is None else completion
        speed = None
        if self._first_s is not None and completion > 1 and self._last_s > self._first_s:
            speed = min(MAX_SPEED, round((completion - 1) / (self._last_s - self._first_s), 3)) or None
        return RequestRecord(
            self._kind,
            ok=code is None,
            error_code=code,
            prompt_tokens=_count(usage, "prompt_tokens", "input_tokens") or 0,
            completion_tokens=completion,
            ttft_ms=None if self._first_s is None else round((self._first_s - self._began_s) * 1000, 3),
            duration_ms=round((time.monotonic() - self._began_s) * 1000, 3),
            tokens_per_s=speed,
            status=status,
            app=self._app,
        )

    def _is_for_the_client(self, event: bytes) -> bool:
        value = _value(event)
        if value is None:
            return True
        response = value.get("response")
        usage = value.get("usage") or (response.get("usage") if isinstance(response, dict) else None)
        if isinstance(usage, dict):
            self._usage = usage
        pieces = _pieces(value)
        if pieces:
            self._last_s = time.monotonic()
            self._first_s = self._first_s or self._last_s
            self._pieces += pieces
        return not (self._hide_usage and value.get("choices") == [] and isinstance(usage, dict))


def _split(data: bytes) -> Iterator[bytes]:
    """Yield the events of ``data``, each with the blank line that ends it."""
    event: list[bytes] = []
    for line in data.splitlines(keepends=True):
        event.append(line)
        if not line.strip(b"\r\n"):
            yield b"".join(event)
            event.clear()
    yield b"".join(event)


def _value(event: bytes) -> dict[str, Any] | None:
    text = b"".join(line.removeprefix(b"data:") for line in event.splitlines() if line.startswith(b"data:"))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # also [DONE], a comment, and a part of an event that is too long
        return None
    return value if isinstance(value, dict) else None


def _pieces(value: dict[str, Any]) -> int:
    """Return how many choices an event of a stream adds something to; servers send a token each."""
    kind = value.get("type")
    if isinstance(kind, str) and kind.endswith(".delta"):
        return 1
    choices = value.get("choices")
    found = [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    return sum(bool(one.get("text")) or _adds(one.get("delta")) for one in found)


def _adds(delta: object) -> bool:
    return isinstance(delta, dict) and any(delta.get(name) for name in _PIECES)


def _usage_at_end(tail: bytes) -> dict[str, Any] | None:
    """Return the last ``usage`` object of an answer. In a text of it, the quotes would stand behind backslashes."""
    _, found, rest = tail.rpartition(b'"usage"')
    text = rest.decode("utf-8", "replace").lstrip()
    if not found or not text.startswith(":"):
        return None
    try:
        usage, _ = json.JSONDecoder().raw_decode(text[1:].lstrip())
    except (ValueError, RecursionError):
        return None
    return usage if isinstance(usage, dict) else None


def _count(usage: dict[str, Any] | None, *names: str) -> int | None:
    for name in names:
        count = (usage or {}).get(name)
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MAX_TOKENS:
            return count
    return None
