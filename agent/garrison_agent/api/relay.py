"""A worker's answer, passed to the client as it comes.

Bytes are never held back for more than one server-sent event or line, and never pile up: a slow client stops us
reading from the worker, whose own send then blocks. A client that goes away closes the worker's connection at once,
which is how the worker learns to stop generating. Nothing of a prompt or an answer is kept or logged.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httptools

from garrison_agent.api.asgi import ClientGoneError, ErrorBody, Request
from garrison_agent.api.errors import RETRY_AFTER_S, WorkerDiedError, deadline_exceeded, stopping

_READ_BYTES = 64 * 1024
_MAX_EVENT_BYTES = 256 * 1024
"""A longer server-sent event is passed on in pieces."""
_SEPARATORS = {b"text/event-stream": b"\n\n", b"application/x-ndjson": b"\n"}
"""What ends one event of a stream, by its content type: server-sent events (OpenAI), lines of JSON (Ollama)."""
_PASSED_HEADERS = frozenset(
    {b"content-type", b"content-length", b"cache-control", b"retry-after", b"inference-header-content-length"}
)
_SENT_HEADERS = ("content-type", "accept", "inference-header-content-length")
_DEADLINE_GRACE_S = 1.0
"""How much longer than the request's own time a worker may take to say that it has passed."""


class Reader(Protocol):
    """Where the answer's bytes come from: ``asyncio.StreamReader``, or what stands before one."""

    async def read(self, size: int, /) -> bytes:
        """Return some bytes, at most ``size``; none at the end. Raises OSError."""
        ...


@dataclass
class Upstream:
    """An open connection to a worker."""

    reader: Reader
    writer: asyncio.StreamWriter
    on_close: Callable[[], None] | None = None
    """Called once, when it is closed."""

    def abort(self) -> None:
        """Close at once; the worker sees it as its client going away."""
        self.writer.transport.abort()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


async def connect(socket: Path) -> Upstream:
    """Return a connection to the worker that listens on ``socket``.

    Raises:
        OSError: Nothing listens there (any more).
    """
    return Upstream(*await asyncio.open_unix_connection(socket, limit=_READ_BYTES))


@dataclass
class _Answer:
    """What the parser has seen of the worker's answer; the method names are httptools' callbacks."""

    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    headers_complete: bool = False
    complete: bool = False
    separator: bytes = b""
    """What ends each event of a stream; empty: this is no stream of events."""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.headers_complete = True
        kind = next((value for name, value in self.headers if name == b"content-type"), b"")
        self.separator = _SEPARATORS.get(kind.partition(b";")[0].strip().lower(), b"")

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True

    def take(self) -> bytes:
        """Return the body bytes that came since the last call."""
        data = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        return data

    def headers_for(self, status: int) -> list[tuple[bytes, bytes]]:
        """Return what of the headers is passed on; who is turned away for now hears when to come back."""
        passed = [header for header in self.headers if header[0] in _PASSED_HEADERS]
        if self.separator:  # it may become shorter, or end with an error
            passed = [header for header in passed if header[0] != b"content-length"]
        if status == 503 and not any(name == b"retry-after" for name, _ in passed):
            passed.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        return passed


async def forward(request: Request, upstream: Upstream, target: str, body: bytes, error_body: ErrorBody) -> None:
    """Send ``body`` to the worker's ``target`` and its answer to the client; closes ``upstream``.

    When the worker dies inside a stream of events or lines, the client gets whole ones only, then one more with
    ``error_body``'s shape. When it dies inside another body, the client's connection breaks off short of its length.

    Raises:
        WorkerDiedError: ``worker.died``; nothing was sent to the client yet.
        DeadlineError: ``inference.deadline_exceeded``; the worker did not keep to it, and nothing was sent yet.
        ClientGoneError: The client closed its connection.
    """
    await exchange(request, upstream, lambda: _send(request, upstream, target, body), error_body)


async def exchange(
    request: Request,
    upstream: Upstream,
    ask: Callable[[], Awaitable[None]],
    error_body: ErrorBody,
    read: Callable[[bytes, bool], bytes] | None = None,
) -> None:
    """Let ``ask`` send what is to be asked over ``upstream``, then pass the answer on; as ``forward`` does.

    ``read`` is given each part of the body, and whether it is one of whole events; the client gets what it returns.
    """
    gone = request.gone()
    gone.add_done_callback(lambda _: upstream.abort())
    answer = _Answer()
    end_s = None if request.deadline_s is None else request.deadline_s + _DEADLINE_GRACE_S
    try:
        async with asyncio.timeout_at(end_s):
            await ask()
            last = await _pass_through(request, upstream.reader, answer, read)
            upstream.abort()  # before the client has it all, and asks who is in use
            await request.end(last)
    except TimeoutError as error:
        if not request.started:
            raise deadline_exceeded() from error
        await _end_early(request, answer, error_body(deadline_exceeded()))
    except WorkerDiedError as error:
        if gone.done():
            raise ClientGoneError from error
        if not request.started:
            raise
        await _end_early(request, answer, error_body(error))
    except asyncio.CancelledError:  # only the server's shutdown cancels requests
        if not request.started:
            raise
        await _end_early(request, answer, error_body(stopping()))
    finally:
        upstream.abort()


async def _end_early(request: Request, answer: _Answer, error: dict[str, object]) -> None:
    """End a stream with an error. Another body stays short of its length: the server breaks it off."""
    if answer.separator:
        start = b"data: " if answer.separator == b"\n\n" else b""
        await request.end(start + json.dumps(error).encode() + answer.separator)


async def _send(request: Request, upstream: Upstream, target: str, body: bytes) -> None:
    method = "GET" if request.method == "HEAD" else request.method  # the server drops the body of a HEAD answer
    head = [f"{method} {target} HTTP/1.1", "host: worker", "connection: close", f"content-length: {len(body)}"]
    head.append(f"x-garrison-app: {request.caller.app}")
    if request.deadline_s is not None:
        left_s = request.deadline_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise deadline_exceeded()
        head.append(f"x-garrison-timeout-ms: {math.ceil(left_s * 1000)}")
    if request.load_s:
        head.append(f"x-garrison-load-ms: {round(request.load_s * 1000)}")
    head += [f"{name}: {value}" for name in _SENT_HEADERS if (value := request.header(name.encode()))]
    try:
        upstream.writer.write("\r\n".join([*head, "", ""]).encode("latin-1"))
        upstream.writer.write(body)
        await upstream.writer.drain()
    except OSError as error:
        died = _died("before it took the request")
        died.unread = True
        raise died from error


async def _pass_through(
    request: Request, reader: Reader, answer: _Answer, read: Callable[[bytes, bool], bytes] | None
) -> bytes:
    """Send what comes until the answer is complete; return the bytes that end it."""
    parser = httptools.HttpResponseParser(answer)
    tail = b""
    while not answer.complete:
        data = await _read(reader)
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise _died("with an answer that is not HTTP") from error
        if not answer.headers_complete:
            continue
        data = answer.take()
        if answer.separator and not answer.complete:
            data, tail = whole_events(tail + data, answer.separator)
        else:
            data, tail = tail + data, b""
        if read is not None:
            data = read(data, bool(answer.separator))
        if not request.started and (data or answer.complete or answer.separator):
            await request.start(parser.get_status_code(), answer.headers_for(parser.get_status_code()))
        if data and not answer.complete:
            await request.write(data)
    return data


async def _read(reader: Reader) -> bytes:
    try:
        data = await reader.read(_READ_BYTES)
    except OSError as error:
        died = _died("before its answer was complete")
        # The peer of a unix socket is reset by one that closes with bytes unread, or never accepted it.
        died.unread = isinstance(error, ConnectionResetError)
        raise died from error
    if not data:
        raise _died("before its answer was complete")
    return data


def whole_events(data: bytes, separator: bytes = b"\n\n") -> tuple[bytes, bytes]:
    """Split ``data`` behind the ``separator`` that ends its last complete event; lines may end with CRLF as well."""
    end = max(_behind(data, separator), _behind(data, separator.replace(b"\n", b"\r\n")))
    if not end:
        return (b"", data) if len(data) <= _MAX_EVENT_BYTES else (data, b"")
    return data[:end], data[end:]


def _behind(data: bytes, separator: bytes) -> int:
    """Return the place behind the last ``separator``; 0 if there is none."""
    last = data.rfind(separator)
    return 0 if last < 0 else last + len(separator)


def _died(when: str) -> WorkerDiedError:
    return WorkerDiedError(
        "worker.died",
        f"the model's worker ended {when}",
        hint="retry; the agent starts it again, and garrison-agent status shows why it ended",
        retryable=True,
    )
