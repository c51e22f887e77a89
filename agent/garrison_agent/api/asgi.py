"""The little of HTTP that the local API needs on top of an ASGI server: requests, JSON answers, and a route table.

A web framework would add 3 MiB to every board for this page. Everything here runs on the API's event loop.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qs

from garrison_agent.api.errors import BadRequestError, MethodError, TooLargeError, TooSlowError
from garrison_agent.core.applications import LOCAL, Application
from garrison_protocol.errors import GarrisonError, NotFoundError, UnavailableError

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Headers: TypeAlias = Iterable[tuple[bytes, bytes]]

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_BODIES_BYTES = 32 * 1024 * 1024
BODY_GRACE_S = 30.0
BODY_BYTES_PER_S = 16 * 1024
"""A body may take ``BODY_GRACE_S``, and longer as long as it comes at this pace."""


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a unix socket, as the kernel says."""

    pid: int
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: an application's name, ``uid:<n>`` of a peer on the unix socket, or ``local``."""

    app: str = LOCAL
    application: Application | None = None
    """What it may use, if it came with a key."""

    @property
    def is_admin(self) -> bool:
        """Whether its key opens the management of the board."""
        return self.application is not None and self.application.admin


class BodyBudget:
    """Bounds the bytes of all request bodies held at once, so that many large ones cannot exhaust a board."""

    def __init__(self, limit: int = MAX_BODIES_BYTES) -> None:
        self.limit = limit
        self.in_use = 0

    def take(self, size: int) -> None:
        """Count ``size`` bytes.

        Raises:
            UnavailableError: ``api.busy``.
        """
        if self.in_use + size > self.limit:
            raise UnavailableError(
                "api.busy", "too many large requests are in progress", hint="retry in a moment", retryable=True
            )
        self.in_use += size

    def give_back(self, size: int) -> None:
        """Stop counting ``size`` bytes."""
        self.in_use -= size


class Request:
    """One HTTP request. ``peer`` is None on TCP. ``close`` must be called when it is answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, budget: BodyBudget, peer: Peer | None) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.peer = peer
        self.params: dict[str, str] = {}
        self.started = False
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._receive = receive
        self._send = send
        self._budget = budget
        self._held = 0
        self._gone: asyncio.Task[None] | None = None
        self._query: bytes = scope.get("query_string", b"")
        self.caller = Caller()
        self.deadline_s: float | None = None
        """Until when (monotonic seconds) it must be answered."""
        self.load_s = 0.0
        """How long it waited for its model to be loaded."""
        self.admitted = False
        """It counts against the limits of its application (``Admission``)."""
        self.answer_headers: list[tuple[bytes, bytes]] = []
        """What goes into the answer's headers besides what its handler gives."""
        self._at_close: list[Callable[[], None]] = []
        self.server_host: str = (scope.get("server") or ("", None))[0]

    def header(self, name: bytes) -> str | None:
        """Return the first header called ``name`` (lower case), or None."""
        return next((value.decode("latin-1") for key, value in self._headers if key == name), None)

    def query(self, name: str) -> str | None:
        """Return the last value of ``name`` in the query string, or None."""
        values = parse_qs(self._query.decode("latin-1"), keep_blank_values=True).get(name)
        return values[-1] if values else None

    async def body(self) -> bytes:
        """Return the whole body.

        Raises:
            TooLargeError: ``api.body_too_large``; above ``MAX_BODY_BYTES``.
            UnavailableError: ``api.busy``.
            TooSlowError: ``api.body_too_slow``.
            ClientGoneError: The client closed before it had sent everything.
        """
        declared = self.header(b"content-length")
        if declared is not None and declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
            raise _too_large(int(declared))
        began_s = asyncio.get_running_loop().time()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout_at(began_s + BODY_GRACE_S) as limit:
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part: bytes = message.get("body", b"")
                    if self._held + len(part) > MAX_BODY_BYTES:
                        raise _too_large(self._held + len(part))
                    self._budget.take(len(part))
                    self._held += len(part)
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
                    limit.reschedule(began_s + BODY_GRACE_S + self._held / BODY_BYTES_PER_S)
        except TimeoutError as error:
            raise TooSlowError(
                "api.body_too_slow",
                f"the body did not come within its time, at {BODY_BYTES_PER_S} bytes a second",
                hint="send it at once",
            ) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def gone(self) -> asyncio.Task[None]:
        """Return a task that ends when the client closes its connection. Call it after the body was read."""
        if self._gone is None:
            self._gone = asyncio.create_task(self._wait_for_disconnect())
        return self._gone

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        """Send the status and headers."""
        self.started = True
        both = [*headers, *self.answer_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": both})

    async def write(self, data: bytes) -> None:
        """Send a part of the body; returns when the client's socket takes more (a slow reader slows its sender)."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the rest of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def answer(self, value: object, status: int = 200, headers: Headers = ()) -> None:
        """Send ``value`` as JSON."""
        data = json.dumps(value, separators=(",", ":")).encode()
        length = str(len(data)).encode()
        await self.start(status, [(b"content-type", b"application/json"), (b"content-length", length), *headers])
        await self.end(data)

    def at_close(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the request is closed."""
        self._at_close.append(action)

    async def close(self) -> None:
        """Release what the request holds."""
        self._budget.give_back(self._held)
        self._held = 0
        for action in self._at_close:
            action()
        self._at_close.clear()
        if self._gone is not None:
            self._gone.cancel()
            await asyncio.wait({self._gone})


def _too_large(size: int) -> TooLargeError:
    return TooLargeError(
        "api.body_too_large",
        f"a body of {size} bytes or more; the limit is {MAX_BODY_BYTES}",
        hint="send less in one request",
        size=size,
        limit=MAX_BODY_BYTES,
    )


def parse_object(body: bytes) -> dict[str, object]:
    """Return the JSON object in ``body``.

    Raises:
        BadRequestError: ``api.bad_json``.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        # The decoder's text names a position only; the body itself must not reach logs or clients.
        detail = str(error) if isinstance(error, json.JSONDecodeError) else "not UTF-8, or nested too deeply"
        raise BadRequestError(
            "api.bad_json", f"the body is not valid JSON: {detail}", hint="send a JSON object"
        ) from error
    if not isinstance(value, dict):
        raise BadRequestError("api.bad_json", "the body is JSON, but not an object", hint="send a JSON object")
    return value


Handler: TypeAlias = Callable[[Request], Awaitable[None]]


class RouteBook:
    """Paths with ``{parameters}`` (one segment each) and their handlers."""

    def __init__(self) -> None:
        self._entries: list[tuple[re.Pattern[str], dict[str, Handler]]] = []
        self._rare: list[tuple[re.Pattern[str], Callable[[RouteBook], None]]] = []

    def add(self, methods: str, path: str, handler: Handler) -> None:
        """Serve ``path`` for the space-separated ``methods``."""
        pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path.replace(".", r"\.")))
        self._entries.append((pattern, dict.fromkeys(methods.split(), handler)))

    def add_rare(self, pattern: str, register: Callable[[RouteBook], None]) -> None:
        """Call ``register`` on the first request whose path matches ``pattern``.

        A surface that a board may never use costs no memory before that.
        """
        self._rare.append((re.compile(pattern), register))

    def find(self, request: Request) -> Handler:
        """Return the handler of ``request`` and set its ``params``.

        Raises:
            NotFoundError: ``api.path_unknown``.
            MethodError: ``api.method_not_allowed``.
        """
        for pattern, register in [entry for entry in self._rare if entry[0].fullmatch(request.path)]:
            self._rare.remove((pattern, register))
            register(self)
        allowed: list[str] = []
        for pattern, handlers in self._entries:
            match = pattern.fullmatch(request.path)
            if match is None:
                continue
            handler = handlers.get("GET" if request.method == "HEAD" else request.method)
            if handler is not None:
                request.params = match.groupdict()
                return handler
            allowed += handlers
        if allowed:
            names = ", ".join(sorted(set(allowed)))
            raise MethodError("api.method_not_allowed", f"{request.method} {request.path}", hint=f"use {names}")
        raise NotFoundError(
            "api.path_unknown",
            f"nothing is served at {request.path}",
            hint="see docs/local-api.md, or GET /openapi.json, for what is",
        )


ErrorBody: TypeAlias = Callable[[GarrisonError], dict[str, object]]
"""The shape in which one surface reports errors."""
