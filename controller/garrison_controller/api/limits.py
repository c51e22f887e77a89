"""A bound on request bodies, kept while they arrive: FastAPI would read them whole before asking who calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from garrison_protocol.errors import InvalidError

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_STRANGERS_BODY_BYTES = 64 * 1024
"""Of boards, which send certificate requests and nothing larger, and of whoever holds no API token: parsed, a body
takes thirty times its length in memory."""
LINGER_S = 5.0
"""After a refusal, for the client to read it."""


class _TooLargeError(Exception):
    pass


class BodyLimit:
    """ASGI middleware that answers 413 to larger bodies.

    ``streams(scope)``: endpoints that bound their own. ``known(scope)``, called in a thread: whether the caller holds
    an API token that counts.
    """

    def __init__(self, app: ASGIApp, streams: Callable[[Scope], bool], known: Callable[[Scope], bool]) -> None:
        self._app = app
        self._streams = streams
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or self._streams(scope):
            await self._app(scope, receive, send)
            return
        limit = MAX_STRANGERS_BODY_BYTES
        asked = scope["path"].startswith("/device/")
        received = 0
        begun = ended = False

        async def bounded() -> Message:
            nonlocal received, limit, asked, ended
            message = await receive()
            ended = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit and not asked:
                asked = True
                if await run_in_threadpool(self._known, scope):
                    limit = MAX_BODY_BYTES
            if received > limit:
                raise _TooLargeError
            return message

        async def watched(message: Message) -> None:
            nonlocal begun
            # FastAPI answers 400 itself when a body cannot be read; ours says more.
            if begun or received <= limit:
                begun = True
                await send(message)

        with contextlib.suppress(_TooLargeError):
            await self._app(scope, bounded, watched)
        if received > limit and not begun:
            hint = (
                "send less at once" if limit == MAX_BODY_BYTES else "only callers with a valid API token may send more"
            )
            error = InvalidError("request.too_large", f"a body above {limit} bytes", hint=hint)
            answer = JSONResponse(error.to_dict(), status_code=413, headers={"Connection": "close"})
            await _answer_in_steps(answer, None if ended else receive, send)


async def _answer_in_steps(answer: JSONResponse, receive: Receive | None, send: Send) -> None:
    """Send ``answer``, and let what the client still sends go by until it has read it (RFC 9112, section 9.6).

    Closed with bytes of the client unread, TCP would reset the connection, and the answer might be lost.
    """
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": receive is not None})
    if receive is None:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
