"""A worker's answer, passed to the client as it comes.

Bytes are never held back for more than one server-sent event, and never pile up: a slow client stops us reading from
the worker, whose own send then blocks. A client that goes away closes the worker's connection at once, which is how
the worker learns to stop generating. Nothing of a prompt or an answer is kept or logged.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

import httptools

from garrison_agent.api.asgi import ClientGoneError, ErrorBody, Request
from garrison_agent.api.errors import WorkerDiedError, stopping

_READ_BYTES = 64 * 1024
_MAX_EVENT_BYTES = 256 * 1024
"""A longer server-sent event is passed on in pieces."""
_PASSED_HEADERS = frozenset({b"content-type", b"content-length", b"cache-control", b"retry-after"})


@dataclass
class Upstream:
    """An open connection to a worker."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def abort(self) -> None:
        """Close at once; the worker sees it as its client going away."""
        self.writer.transport.abort()


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

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.headers_complete = True

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True

    def take(self) -> bytes:
        """Return the body bytes that came since the last call."""
        data = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        return data

    @property
    def passed_headers(self) -> list[tuple[bytes, bytes]]:
        return [header for header in self.headers if header[0] in _PASSED_HEADERS]

    @property
    def is_event_stream(self) -> bool:
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)


async def forward(request: Request, upstream: Upstream, target: str, body: bytes, error_body: ErrorBody) -> None:
    """Send ``body`` to the worker's ``target`` and its answer to the client; closes ``upstream``.

    When the worker dies inside an event stream, the client gets whole events only, then one ``data:`` event with
    ``error_body``'s shape. When it dies inside another body, the client's connection breaks off short of its length.

    Raises:
        WorkerDiedError: ``worker.died``; nothing was sent to the client yet.
        ClientGoneError: The client closed its connection.
    """
    gone = request.gone()
    gone.add_done_callback(lambda _: upstream.abort())
    answer = _Answer()
    try:
        await _send(request, upstream, target, body)
        await _pass_through(request, upstream.reader, answer)
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
    """End an event stream with an error. Another body stays short of its length: the server breaks it off."""
    if answer.is_event_stream:
        await request.end(b"data: " + json.dumps(error).encode() + b"\n\n")


async def _send(request: Request, upstream: Upstream, target: str, body: bytes) -> None:
    method = "GET" if request.method == "HEAD" else request.method  # the server drops the body of a HEAD answer
    head = [f"{method} {target} HTTP/1.1", "host: worker", "connection: close", f"content-length: {len(body)}"]
    head += [f"{name}: {value}" for name in ("content-type", "accept") if (value := request.header(name.encode()))]
    try:
        upstream.writer.write("\r\n".join([*head, "", ""]).encode("latin-1"))
        upstream.writer.write(body)
        await upstream.writer.drain()
    except OSError as error:
        raise _died("before it took the request") from error


async def _pass_through(request: Request, reader: asyncio.StreamReader, answer: _Answer) -> None:
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
        if answer.is_event_stream and not answer.complete:
            data, tail = whole_events(tail + data)
        else:
            data, tail = tail + data, b""
        if not request.started and (data or answer.complete or answer.is_event_stream):
            await request.start(parser.get_status_code(), answer.passed_headers)
        if data and not answer.complete:
            await request.write(data)
    await request.end(data)


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        data = await reader.read(_READ_BYTES)
    except OSError as error:
        raise _died("before its answer was complete") from error
    if not data:
        raise _died("before its answer was complete")
    return data


def whole_events(data: bytes) -> tuple[bytes, bytes]:
    """Split ``data`` behind its last complete server-sent event."""
    end = data.rfind(b"\n\n") + 2
    if end == 1 and len(data) <= _MAX_EVENT_BYTES:
        return b"", data
    return (data, b"") if end == 1 else (data[:end], data[end:])


def _died(when: str) -> WorkerDiedError:
    return WorkerDiedError(
        "worker.died",
        f"the model's worker ended {when}",
        hint="retry; the agent starts it again (garrison-agent status shows why it ended)",
        retryable=True,
    )
