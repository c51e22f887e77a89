"""The little of HTTP that a worker needs, on plain ASGI: bounded bodies, JSON answers, disconnects.

There is no framework between the decode thread and the socket: its cost would be paid for every token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 16 * 1024 * 1024


class BodyTooLargeError(Exception):
    """The request's body is longer than ``MAX_BODY_BYTES``."""


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


class Application(Protocol):
    """What an engine offers to the server: an ASGI callable for HTTP requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""


async def read_body(receive: Receive) -> bytes:
    """Return the whole request body.

    Raises:
        BodyTooLargeError: It is longer than ``MAX_BODY_BYTES``.
        ClientGoneError: The client went away in the middle of it.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise BodyTooLargeError
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def send_json(send: Send, status: int, value: object, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Send ``value`` as the whole answer."""
    await send_body(send, status, json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), headers)


async def send_body(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Send ``body``, which is JSON, as the whole answer."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def start_event_stream(send: Send) -> None:
    """Begin an answer of server-sent events; the caller sends the parts and ends it."""
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")],
        }
    )


@contextlib.asynccontextmanager
async def on_disconnect(receive: Receive, action: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``action`` once if the client goes away inside the block. The body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        action()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
