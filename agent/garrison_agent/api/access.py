"""From a model's name to an open connection to its worker, and from a command to the owner thread's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from garrison_agent.api.asgi import ClientGoneError, Request
from garrison_agent.api.commands import Command, LoadModel, Post, unknown_model
from garrison_agent.api.relay import Upstream, connect
from garrison_agent.api.routes import Route, RouteTable
from garrison_protocol.errors import UnavailableError

COMMAND_TIMEOUT_S = 15.0
LOAD_TIMEOUT_S = 120.0


class ModelAccess:
    """What request handlers know of the agent: its route table (read without a lock) and its command queue."""

    def __init__(self, table: Callable[[], RouteTable], command: Post, load_timeout_s: float = LOAD_TIMEOUT_S) -> None:
        self._table = table
        self._command = command
        self._load_timeout_s = load_timeout_s

    @property
    def table(self) -> RouteTable:
        """The routes of this moment."""
        return self._table()

    def find(self, name: str) -> Route:
        """Return the route called ``name``.

        Raises:
            NotFoundError: ``model.unknown``; the hint lists the known names.
        """
        table = self._table()
        route = table.find(name)
        if route is None:
            raise unknown_model(name, table.names)
        return route

    async def open(self, request: Request, name: str) -> tuple[Route, Upstream]:
        """Return the route called ``name`` and a connection to its worker, loading the model first if need be.

        Raises:
            NotFoundError: ``model.unknown``.
            UnavailableError: ``model.loading`` (it takes too long) or ``worker.unreachable``.
            ClientGoneError: The client closed while the model was loading.
            GarrisonError: What loading failed with.
        """
        route = self.find(name)
        if route.socket is None:
            route = await self._load(request, route)
        try:
            return route, await _connect(route)
        except OSError:
            # The table may have changed since it was read: a switch stops the old worker after swapping the table.
            newer = self._table().find(name)
            if newer is None or newer.socket in (None, route.socket):
                raise _unreachable(route) from None
        try:
            return newer, await _connect(newer)
        except OSError as error:
            raise _unreachable(newer) from error

    async def _load(self, request: Request, route: Route) -> Route:
        answer = asyncio.ensure_future(self.ask(LoadModel(route.alias), self._load_timeout_s))
        gone = request.gone()
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            raise ClientGoneError
        answer.result()
        loaded = self.find(route.alias)
        if loaded.socket is None:
            raise _loading(route.alias)
        return loaded

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


async def _connect(route: Route) -> Upstream:
    if route.socket is None:
        raise FileNotFoundError(route.alias)
    return await connect(route.socket)


def _look_at(answer: asyncio.Future[object]) -> None:
    """Mark a refusal as seen: its request may have timed out, and asyncio warns of exceptions nobody looked at."""
    if not answer.cancelled():
        answer.exception()


def _loading(name: str) -> UnavailableError:
    return UnavailableError(
        "model.loading", f"{name} is still being loaded", hint="retry in a moment", retryable=True, model=name
    )


def _unreachable(route: Route) -> UnavailableError:
    return UnavailableError(
        "worker.unreachable",
        f"the worker of {route.model_id} does not answer",
        hint="retry in a moment; the agent starts it again",
        retryable=True,
        model=route.model_id,
    )
