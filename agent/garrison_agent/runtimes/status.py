"""What a worker says about itself: events, and their JSON lines on the status pipe.

Each line is one object with ``event`` and that event's fields. The end of the pipe means the end of the worker.
No line ever holds a prompt or an answer.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MAX_LINE_BYTES = 256 * 1024

RequestKind = Literal["chat", "completion", "embedding", "infer"]


@dataclass(frozen=True)
class RequestRecord:
    """One answered (or refused) request, without its content.

    ``ok`` tells whether an answer was given. ``error_code`` says why not, or ``inference.client_disconnected`` when
    the caller went away first. ``status`` is the HTTP status: 5xx is the model's fault, 4xx the caller's.
    ``tokens_per_s`` covers generation after the first token. ``app`` is who asked: an application's name, ``uid:<n>``,
    or ``local``.
    """

    kind: RequestKind
    ok: bool
    error_code: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_ms: float | None = None
    duration_ms: float = 0.0
    tokens_per_s: float | None = None
    status: int = 200
    app: str = ""


@dataclass(frozen=True)
class Verified:
    """Every file has the size and digest that the manifest states; nothing native was imported before."""

    hash_ms: float


@dataclass(frozen=True)
class Ready:
    """The model is loaded and the socket answers."""

    load_ms: float
    rss_mb: float
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The worker cannot serve; ``Exited`` follows. Codes: docs/errors.md, "model." and "worker."."""

    code: str
    message: str


@dataclass(frozen=True)
class Exited:
    """The worker is gone. A negative ``returncode`` is the signal that ended it; None: it never started."""

    returncode: int | None
    code: str = "model.crashed"
    """``worker.stalled`` or ``worker.out_of_memory`` where that is known to be why."""
    message: str = ""
    """How it ended; empty if it ended as asked."""


@dataclass(frozen=True)
class RequestDone:
    """A request ended."""

    record: RequestRecord


WorkerEvent = Verified | Ready | Failed | Exited | RequestDone
_NAMES: dict[str, type[Verified] | type[Ready] | type[Failed]] = {
    "verified": Verified,
    "ready": Ready,
    "failed": Failed,
}


class StatusWriter:
    """The worker's end of the pipe. One line is one ``write``, so lines of several threads never mix."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, event: Verified | Ready | Failed | RequestDone) -> None:
        """Write one event.

        Raises:
            BrokenPipeError: The agent is gone.
        """
        os.write(self._descriptor, encode_event(event))


def encode_event(event: Verified | Ready | Failed | RequestDone) -> bytes:
    """Return the line for ``event``."""
    body = asdict(event.record) if isinstance(event, RequestDone) else asdict(event)
    name = "request" if isinstance(event, RequestDone) else type(event).__name__.lower()
    return json.dumps({"event": name, **body}, separators=(",", ":")).encode() + b"\n"


def decode_event(line: bytes) -> WorkerEvent:
    """Return the event in ``line``.

    Raises:
        ValueError: This is no line of a worker of this version; a bug, or a corrupted worker.
    """
    body = json.loads(line)
    if not isinstance(body, dict):
        raise ValueError("a status line is an object")
    name = body.pop("event", None)
    try:
        if name == "request":
            return RequestDone(RequestRecord(**body))
        return _NAMES[name](**body)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a worker event: {name!r}") from error
