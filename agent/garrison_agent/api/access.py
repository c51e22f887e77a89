"""From a model's name to an open connection to its worker, and from a command to the owner thread's answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from garrison_agent.api.admission import Admission
from garrison_agent.api.asgi import Caller, ClientGoneError, ErrorBody, Request
from garrison_agent.api.commands import Command, LoadModel, Post, RecordRequest, unknown_model
from garrison_agent.api.errors import BadRequestError, WorkerDiedError, deadline_exceeded
from garrison_agent.api.relay import Upstream, connect, forward
from garrison_agent.api.routes import Route, RouteTable
from garrison_agent.api.traffic import Traffic
from garrison_agent.core.applications import ApplicationTable
from garrison_protocol.errors import DeniedError, InsufficientError, UnavailableError

if TYPE_CHECKING:  # a board without upstreams does without
    from garrison_agent.api.commands import UpstreamView
    from garrison_agent.api.upstreams import Upstreams, UpstreamServer

COMMAND_TIMEOUT_S = 15.0
LOAD_TIMEOUT_S = 120.0
_END_CHECKS = 20
_END_CHECK_S = 0.05
"""How often and how far apart to look whether the owner has heard of a worker's end."""
_ROOM_CHECK_S, _ROOM_CHECK_MAX_S = 0.05, 0.8
"""How long to wait before asking again for memory that other requests hold: at first, and at most."""
_HELD_CHECK_S = 0.1

CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 (a Caller is immutable)
"""Who sent the request that is being answered: no surface can forget to ask whether a model is for this caller."""


def _permit(name: str, names: tuple[str, ...]) -> None:
    """Refuse a model that answers to ``names`` to a caller whom it is not for."""
    application = CALLER.get().application
    if application is not None and not application.may_use(names):
        raise DeniedError(
            "api.model_not_permitted",
            f"{application.name} may not use {name}",
            hint="ask for one of the models that GET /v1/models lists, or for a key that opens this one",
            param="model",
        )


class ModelAccess:
    """What request handlers know of the agent: its route table (read without a lock) and its command queue.

    Callers see the models that are for them alone.
    """

    def __init__(
        self,
        table: Callable[[], RouteTable],
        command: Post,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        *,
        admission: Admission | None = None,
        traffic: Traffic | None = None,
        upstreams: Upstreams | None = None,
    ) -> None:
        """``admission`` limits applications; None: there are none. ``traffic`` counts requests for the owner."""
        self._upstreams = upstreams
        self._traffic = traffic or Traffic(time.monotonic)
        self._admission = admission or Admission(ApplicationTable)
        self._table = table
        self._command = command
        self._load_timeout_s = load_timeout_s

    @property
    def table(self) -> RouteTable:
        """The routes of this moment that the caller may use."""
        table, application = self._table(), CALLER.get().application
        if application is None or not application.models:
            return table
        return RouteTable(tuple(route for route in table.routes if application.may_use(route.names)))

    def find(self, name: str) -> Route:
        """Return the route called ``name``.

        Raises:
            NotFoundError: ``model.unknown``; the hint lists the known names.
            DeniedError: ``api.model_not_permitted``; it is not for this caller.
        """
        route = self._table().find(name)
        if route is None:
            if self.find_upstream(name) is not None:
                raise BadRequestError(
                    "api.wrong_protocol",
                    f"{name} is an upstream server, which OpenAI's text paths alone reach",
                    hint="POST /v1/chat/completions (OpenAI)",
                    param="model",
                )
            raise unknown_model(name, [*self.table.names, *(server.alias for server in self.upstreams)])
        _permit(name, route.names)
        return route

    @property
    def upstreams(self) -> list[UpstreamServer]:
        """The upstreams that the caller may use; a signed model of the same name stands in the way of one."""
        servers = [] if self._upstreams is None else self._upstreams.servers
        application, table = CALLER.get().application, self._table()
        return [
            server
            for server in servers
            if table.find(server.alias) is None and (application is None or application.may_use((server.alias,)))
        ]

    def find_upstream(self, name: str) -> UpstreamServer | None:
        """Return the upstream called ``name``, unless a signed model answers to that name.

        Raises:
            DeniedError: ``api.model_not_permitted``; it is not for this caller.
        """
        server = None if self._upstreams is None else self._upstreams.find(name)
        if server is None or self._table().find(name) is not None:
            return None
        _permit(name, (name,))
        return server

    async def upstream_views(self) -> list[UpstreamView]:
        """Return what ``status`` shows of the upstreams; takes as long as they take to answer, at most seconds."""
        if self._upstreams is None:
            return []
        table = self._table()
        return await self._upstreams.views(lambda alias: table.find(alias) is not None)

    async def forward_upstream(self, request: Request, server: UpstreamServer, body: bytes) -> None:
        """Pass a request on to an upstream, as far as the caller's limits allow; raises as ``UpstreamServer``."""
        self._admission.enter(request)
        await server.forward(request, body, lambda done: self.tell(RecordRequest(server.alias, server.id, done)))

    async def open(self, request: Request, name: str) -> tuple[Route, Upstream]:
        """Return the route called ``name`` and a connection to its worker, loading the model first if need be.

        Raises:
            NotFoundError: ``model.unknown``.
            DeniedError: ``api.model_not_permitted``.
            LimitedError: ``api.requests_limited``, ``api.tokens_limited``, or ``api.concurrency_limited``.
            UnavailableError: ``model.loading`` (it takes too long), ``model.failed``, or ``worker.unreachable``.
            ClientGoneError: The client closed while the model was loading.
            GarrisonError: What loading failed with.
        """
        self.find(name)
        self._admission.enter(request)
        return await self._open(request, name)

    async def pass_on(
        self, request: Request, name: str, target: str | Callable[[Route], str], body: bytes, error_body: ErrorBody
    ) -> None:
        """Send ``body`` to the ``target`` path of the model's worker and its answer to the client.

        A worker that ended before it had read the request cannot have died of it: its successor gets it, once.

        Raises:
            GarrisonError: As ``open``, and as ``relay.forward``.
        """
        route, upstream = await self.open(request, name)
        for last in (False, True):
            try:
                path = target if isinstance(target, str) else target(route)
                await forward(request, upstream, path, body, error_body)
                return
            except WorkerDiedError as error:
                if last or not error.unread:
                    raise
            route, upstream = await self._open(request, name)

    async def _open(self, request: Request, name: str) -> tuple[Route, Upstream]:
        route = self.find(name)
        if route.failure is not None:
            raise _failed(route, route.failure)
        if route.socket is None:
            route = await self._load(request, route)
        elif self._traffic.held_s(route.socket):
            await _while_there(request, self._await_turn(route.socket))
        upstream = await self._connect(route)
        if upstream is not None:
            return route, upstream
        # The table may have changed since it was read: a switch stops the old worker after swapping the table, and a
        # model that nobody used may be on its way out of memory. Or the worker has died this moment.
        newer = await self._successor(name, route)
        if newer.socket in (None, route.socket):
            newer = await self._load(request, newer)
        upstream = await self._connect(newer)
        if upstream is None:
            raise _unreachable(newer)
        return newer, upstream

    async def _successor(self, name: str, route: Route) -> Route:
        """Return the route that takes the place of ``route``, whose worker takes no requests any more.

        Raises:
            UnavailableError: ``worker.unreachable``; nobody heard of its worker's end, or its alias is gone.
        """
        for _ in range(_END_CHECKS):
            newer = self._table().find(name)
            retired = route.socket is not None and self._traffic.look(route.socket).retired
            if newer is None:
                break
            if newer.failure is not None:
                raise _failed(newer, newer.failure)
            if newer.socket != route.socket or retired:
                return newer
            await asyncio.sleep(_END_CHECK_S)  # a process that ends closes its socket before the owner hears of it
        raise _unreachable(route)

    def admit(self, request: Request) -> None:
        """Count ``request`` against the caller's limits; what passes on to a worker does that by itself.

        Raises:
            LimitedError: ``api.requests_limited``, ``api.tokens_limited``, or ``api.concurrency_limited``.
        """
        self._admission.enter(request)

    async def load(self, request: Request, route: Route, keep_alive_s: float | None) -> None:
        """Bring the route's model into memory as a request to it would, which raises the same."""
        self._admission.enter(request)
        if route.failure is not None:
            raise _failed(route, route.failure)
        await self._load(request, route, keep_alive_s)

    async def _connect(self, route: Route) -> Upstream | None:
        """Return a connection to the route's worker, counted until it is closed; None if it takes none any more."""
        socket, traffic = route.socket, self._traffic
        if socket is None or not traffic.enter(socket):
            return None
        try:
            upstream = await connect(socket)
        except BaseException as error:
            traffic.leave(socket)
            if isinstance(error, OSError):
                return None
            raise
        upstream.on_close = lambda: traffic.leave(socket)
        return upstream

    async def _await_turn(self, socket: Path) -> None:
        """Wait while the worker's memory is wanted for another model, which comes once its requests have ended.

        Whoever wants it gives up after as long as this waits; then the worker goes on.
        """
        end_s = time.monotonic() + self._load_timeout_s
        while self._traffic.held_s(socket) and time.monotonic() < end_s:
            await asyncio.sleep(_HELD_CHECK_S)

    async def _load(self, request: Request, route: Route, keep_alive_s: float | None = None) -> Route:
        began_s = time.monotonic()
        await _while_there(request, self._load_when_room(LoadModel(route.alias, keep_alive_s, waits=True)))
        request.load_s = time.monotonic() - began_s
        loaded = self.find(route.alias)
        if loaded.socket is None:
            raise _loading(route.alias)
        return loaded

    async def _load_when_room(self, command: LoadModel) -> None:
        """Load a model; while requests to others keep them in memory that it needs, wait until they have ended.

        Raises:
            InsufficientError: There is no room, and none is to be expected, or there was none for too long.
            GarrisonError: What loading failed with.
        """
        pause_s, end_s = _ROOM_CHECK_S, time.monotonic() + self._load_timeout_s
        while True:
            try:
                await self.ask(command, max(0.0, end_s - time.monotonic()))
            except InsufficientError as error:
                if not error.retryable or time.monotonic() + pause_s >= end_s:
                    raise
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(_ROOM_CHECK_MAX_S, pause_s * 2)

    async def ask(self, command: Command, timeout_s: float = COMMAND_TIMEOUT_S) -> object:
        """Return the owner's answer to ``command``.

        Raises:
            UnavailableError: ``model.loading`` or ``agent.busy``; no answer within ``timeout_s``.
            GarrisonError: The owner's refusal.
        """
        answer = asyncio.wrap_future(self._command(command))
        answer.add_done_callback(_look_at)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), timeout_s)
        except TimeoutError as error:
            if isinstance(command, LoadModel):
                raise _loading(command.name) from error
            raise UnavailableError(
                "agent.busy", "the agent did not answer in time", hint="retry in a moment", retryable=True
            ) from error

    def tell(self, command: Command) -> None:
        """Hand ``command`` to the owner without waiting; nobody hears of a refusal."""
        asyncio.wrap_future(self._command(command)).add_done_callback(_look_at)


async def _while_there(request: Request, work: Coroutine[None, None, None]) -> None:
    """Wait for ``work``, unless the client goes or the request's time passes.

    Raises:
        ClientGoneError: The client closed.
        GarrisonError: ``inference.deadline_exceeded``, or what ``work`` failed with.
    """
    task, gone = asyncio.ensure_future(work), request.gone()
    left_s = None
    if request.deadline_s is not None:
        left_s = max(0.0, request.deadline_s - asyncio.get_running_loop().time())
    await asyncio.wait({task, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        if gone.done():
            raise ClientGoneError
        raise deadline_exceeded()
    task.result()


def _look_at(answer: asyncio.Future[object]) -> None:
    """Mark a refusal as seen: its request may have timed out, and asyncio warns of exceptions nobody looked at."""
    if not answer.cancelled():
        answer.exception()


def _loading(name: str) -> UnavailableError:
    return UnavailableError(
        "model.loading", f"{name} is still being loaded", hint="retry in a moment", retryable=True, model=name
    )


def _failed(route: Route, why: str) -> UnavailableError:
    return UnavailableError(
        "model.failed",
        f"{route.model_id} failed again and again: {why}",
        hint=f"find the cause, then: garrison-agent model load {route.alias}; by itself it is tried again but rarely",
        retryable=True,
        model=route.model_id,
    )


def _unreachable(route: Route) -> UnavailableError:
    return UnavailableError(
        "worker.unreachable",
        f"the worker of {route.model_id} does not answer",
        hint="retry in a moment; the agent starts it again",
        retryable=True,
        model=route.model_id,
    )
