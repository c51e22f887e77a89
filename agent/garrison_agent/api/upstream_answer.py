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
WHOLE_BYTES = 256 * 1024
"""An answer up to this size is read as what it is; of a longer one, only the end, where ``usage`` stands."""
TAIL_BYTES = 64 * 1024
MAX_MATCHES = 32
"""Places in such an end where ``usage`` is looked for; what an application put there itself is no count."""
MAX_TOKENS = 10**7
"""More than any model reads or writes for one request."""
MAX_SPEED = 1e9
"""Tokens a second. An upstream says what it likes; what is recorded has the bounds of ``RequestRecord``."""
_KINDS: dict[str, RequestKind] = {"/v1/completions": "completion", "/v1/embeddings": "embedding"}
_BARE = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"})
"""What the event that tells the usage, and was asked for by the board alone, has; more than that reaches the client."""
_PROMPT, _ANSWER = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")
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
        self._held = bytearray()
        """The answer, or its end; of a stream, what was no whole event."""
        self._whole = True

    def read(self, data: bytes, events: bool) -> bytes:
        """Take in a part of the body, and return what of it the client gets. ``events``: whole ones of a stream."""
        if events:
            return b"".join(self._read_event(event) for event in _split(data))
        self._hold(data)
        return data

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
        held = bytes(self._held)
        usage = self._usage or (_usage_of(held) if self._whole else _usage_at_end(held)) or {}
        completion = _count(usage, _ANSWER)
        completion = self._pieces if completion is None else completion
        speed = None
        if self._first_s is not None and completion > 1 and self._last_s > self._first_s:
            speed = min(MAX_SPEED, round((completion - 1) / (self._last_s - self._first_s), 3)) or None
        return RequestRecord(
            self._kind,
            ok=code is None,
            error_code=code,
            prompt_tokens=_count(usage, _PROMPT) or 0,
            completion_tokens=completion,
            ttft_ms=None if self._first_s is None else round((self._first_s - self._began_s) * 1000, 3),
            duration_ms=round((time.monotonic() - self._began_s) * 1000, 3),
            tokens_per_s=speed,
            status=status,
            app=self._app,
        )

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > WHOLE_BYTES:
            self._whole = False
            del self._held[:-TAIL_BYTES]

    def _read_event(self, event: bytes) -> bytes:
        """Take in one event, and return what of it the client gets."""
        text = b"".join(line.removeprefix(b"data:") for line in event.splitlines() if line.startswith(b"data:"))
        value = _object(text) if text else None
        if value is None:
            if event.strip() and text.strip() != b"[DONE]":  # a part of one that is too long, or a comment
                self._whole = False
                self._hold(event)
            return event
        usage = _told_usage(value)
        self._usage = usage or self._usage
        pieces = _pieces(value)
        if pieces:
            self._last_s = time.monotonic()
            self._first_s = self._first_s or self._last_s
            self._pieces += pieces
        if not self._hide_usage or usage is None or value.get("choices") != []:
            return event
        more = {name: value[name] for name in value if name != "usage"}
        return b"" if more.keys() <= _BARE else b"data: " + json.dumps(more).encode() + b"\n\n"


def _split(data: bytes) -> Iterator[bytes]:
    """Yield the events of ``data``, each with the blank line that ends it."""
    event: list[bytes] = []
    for line in data.splitlines(keepends=True):
        event.append(line)
        if not line.strip(b"\r\n"):
            yield b"".join(event)
            event.clear()
    yield b"".join(event)


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _told_usage(value: dict[str, Any]) -> dict[str, Any] | None:
    """Return the ``usage`` of an answer or an event, if it tells a count."""
    response = value.get("response")
    for holder in (value, response):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict) and _count(usage, _PROMPT + _ANSWER) is not None:
            return usage
    return None


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


def _usage_of(text: bytes) -> dict[str, Any] | None:
    value = _object(text)
    return None if value is None else _told_usage(value)


def _usage_at_end(tail: bytes) -> dict[str, Any] | None:
    """Return the last ``usage`` that tells a count. In a text of the answer, the quotes stand behind backslashes."""
    decode = json.JSONDecoder().raw_decode
    for _ in range(MAX_MATCHES):
        tail, found, rest = tail.rpartition(b'"usage"')
        if not found:
            break
        text = rest[:TAIL_BYTES].decode("utf-8", "replace").lstrip()
        if not text.startswith(":"):
            continue
        try:
            usage, _ = decode(text[1:].lstrip())
        except (ValueError, RecursionError):
            continue
        if isinstance(usage, dict) and _count(usage, _PROMPT + _ANSWER) is not None:
            return usage
    return None


def _count(usage: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        count = usage.get(name)
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MAX_TOKENS:
            return count
    return None
