"""What an upstream's answer says of its tokens, read while it passes; nothing of its text is kept.

Fields and events: OpenAI's API reference, "Chat", "Completions", "Responses", and "Embeddings". What is not as they say
is passed on and not counted.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from garrison_agent.api.errors import http_status
from garrison_agent.core.health import CLIENT_GONE
from garrison_agent.runtimes.status import RequestKind, RequestRecord
from garrison_protocol.errors import GarrisonError

CLIENT_LEFT = 499
WHOLE_BYTES = 256 * 1024
"""An answer up to this size is read as what it is; of a longer one, begin and end, where ``usage`` may stand."""
PART_BYTES = 64 * 1024
MAX_MATCHES = 32
"""Places in each where ``usage`` is looked for. An application may have put some there: the highest counts hold."""
MAX_TOKENS = 10**7
"""More than any model reads or writes for one request."""
MAX_SPEED = 1e9
"""Tokens a second. An upstream says what it likes; what is recorded has the bounds of ``RequestRecord``."""
_KINDS: dict[str, RequestKind] = {"/v1/completions": "completion", "/v1/embeddings": "embedding"}
_BARE = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"})
"""What the event that tells the usage, and was asked for by the board alone, has; more than that reaches the client."""
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
        self._usage = _Usage()
        self._begin = b""
        self._held = bytearray()
        """The answer, or its end; of a stream, what was no whole event."""

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
        self._look_at_held()
        completion = self._pieces if self._usage.completion is None else self._usage.completion
        speed = None
        if self._first_s is not None and completion > 1 and self._last_s > self._first_s:
            speed = min(MAX_SPEED, round((completion - 1) / (self._last_s - self._first_s), 3)) or None
        return RequestRecord(
            self._kind,
            ok=code is None,
            error_code=code,
            prompt_tokens=self._usage.prompt or 0,
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
            self._begin = self._begin or bytes(self._held[:PART_BYTES])
            del self._held[:-PART_BYTES]

    def _look_at_held(self) -> None:
        held = bytes(self._held)
        value = None if self._begin else _object(held)
        if value is not None:
            self._usage.take_from(value)
            return
        for part in (self._begin, held):
            for usage in _usages(part):
                self._usage.take(usage)

    def _read_event(self, event: bytes) -> bytes:
        """Take in one event, and return what of it the client gets."""
        text = b"".join(line.removeprefix(b"data:") for line in event.splitlines() if line.startswith(b"data:"))
        value = _object(text) if text else None
        if value is None:
            if event.strip() and text.strip() != b"[DONE]":  # a part of one that is too long, or a comment
                self._hold(event)
            return event
        told = self._usage.take_from(value)
        pieces = _pieces(value)
        if pieces:
            self._last_s = time.monotonic()
            self._first_s = self._first_s or self._last_s
            self._pieces += pieces
        if not self._hide_usage or not told or value.get("choices") != [] or "error" in value:
            return event
        more = {name: value[name] for name in value if name != "usage"}
        if more.keys() <= _BARE:
            return b""
        # Such as a server's timings, which would stand in its last piece otherwise; clients look for a choice there.
        added: dict[str, object] = {"text": ""} if self._kind == "completion" else {"delta": {}}
        more["choices"] = [{"index": 0, **added, "finish_reason": None}]
        return b"data: " + json.dumps(more).encode() + b"\n\n"


@dataclass
class _Usage:
    """The highest counts that were told; None: none was."""

    prompt: int | None = None
    completion: int | None = None

    def take(self, usage: object) -> bool:
        """Take in what may be a ``usage`` object; tell whether it was one."""
        prompt = _count(usage, "prompt_tokens", "input_tokens")
        completion = _count(usage, "completion_tokens", "output_tokens")
        self.prompt = _higher(self.prompt, prompt)
        self.completion = _higher(self.completion, completion)
        return prompt is not None or completion is not None

    def take_from(self, value: dict[str, Any]) -> bool:
        """Take in the ``usage`` of an answer or an event; tell whether it has one."""
        response = value.get("response")
        return self.take(value.get("usage")) or (isinstance(response, dict) and self.take(response.get("usage")))


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


def _usages(text: bytes) -> Iterator[object]:
    """Yield what stands behind ``"usage":`` in a part of an answer. In its texts, quotes stand behind backslashes."""
    decode = json.JSONDecoder().raw_decode
    for rest in text.split(b'"usage"')[1:][-MAX_MATCHES:]:
        value = rest.decode("utf-8", "replace").lstrip()
        if value.startswith(":"):
            with contextlib.suppress(ValueError, RecursionError):
                yield decode(value[1:].lstrip())[0]


def _count(usage: object, *names: str) -> int | None:
    if not isinstance(usage, dict):
        return None
    for name in names:
        count = usage.get(name)
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MAX_TOKENS:
            return count
    return None


def _higher(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)
