"""What a worker says about itself: events, and their JSON lines on the status pipe.

Each line is one object with ``event`` and that event's fields. The end of the pipe means the end of the worker.
No line ever holds a prompt or an answer.

A worker runs native code over whatever an application sends, so the agent believes no line of it: fields have the types
and bounds that stand here, or the worker is ended.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Le, MaxLen

if TYPE_CHECKING:  # workers write lines and read none
    from pydantic import TypeAdapter

MAX_LINE_BYTES = 256 * 1024
MAX_MESSAGE = 4000
"""Characters; what is longer is cut off."""

RequestKind = Literal["chat", "completion", "embedding", "infer"]
Count: TypeAlias = Annotated[int, Ge(0), Le(10**9)]
Duration: TypeAlias = Annotated[float, Ge(0), Le(1e10)]
"""Milliseconds."""
Speed: TypeAlias = Annotated[float, Ge(1e-6), Le(1e9)]
Size: TypeAlias = Annotated[float, Ge(0), Le(1e9)]
"""MiB."""
MAX_APP = 128
"""Characters of a name that the agent says; what is longer is cut off."""
Code: TypeAlias = Annotated[str, MaxLen(100)]


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
    error_code: Code | None = None
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    ttft_ms: Duration | None = None
    duration_ms: Duration = 0.0
    tokens_per_s: Speed | None = None
    status: Annotated[int, Ge(100), Le(599)] = 200
    app: Annotated[str, MaxLen(MAX_APP)] = ""


@dataclass(frozen=True)
class Verified:
    """Every file has the size and digest that the manifest states; nothing native was imported before."""

    hash_ms: Duration


@dataclass(frozen=True)
class Ready:
    """The model is loaded and the socket answers."""

    load_ms: Duration
    rss_mb: Size
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The worker cannot serve; ``Exited`` follows. Codes: docs/errors.md, "model." and "worker."."""

    code: Code
    message: Annotated[str, MaxLen(MAX_MESSAGE)]


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
    if isinstance(event, Failed):
        event = replace(event, message=event.message[:MAX_MESSAGE])
    body = asdict(event.record) if isinstance(event, RequestDone) else asdict(event)
    name = "request" if isinstance(event, RequestDone) else type(event).__name__.lower()
    return json.dumps({"event": name, **body}, separators=(",", ":")).encode() + b"\n"


def decode_event(line: bytes) -> WorkerEvent:
    """Return the event in ``line``.

    Raises:
        ValueError: This is no line of a worker of this version; a bug, or a worker that others have taken over.
    """
    try:
        body = json.loads(line)
        event: WorkerEvent | RequestRecord = _readers()[body.pop("event")].validate_python(body)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a worker event") from error
    return RequestDone(event) if isinstance(event, RequestRecord) else event


@cache
def _readers() -> dict[str, TypeAdapter[Any]]:
    from pydantic import TypeAdapter

    kinds = {"verified": Verified, "ready": Ready, "failed": Failed, "request": RequestRecord}
    return {name: TypeAdapter(kind) for name, kind in kinds.items()}
