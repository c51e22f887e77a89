"""Garrison's own management surface, ``/garrison/v1``, which the command line speaks over the unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import asdict
from hmac import compare_digest
from typing import Any

from garrison_agent.api.access import LOAD_TIMEOUT_S, ModelAccess
from garrison_agent.api.asgi import Request, RouteBook
from garrison_agent.api.carrier import Carrier, Wanted, parse_failure
from garrison_agent.api.commands import (
    BeginImport,
    Doctor,
    GetExport,
    GetStatus,
    ListCache,
    ListModels,
    LoadModel,
    RemoveFromCache,
    UnloadModel,
    unknown_model,
)
from garrison_protocol.errors import GarrisonError, NotFoundError

POLL_S = 1.0
"""How long a reader of a bundle waits for the next question before it hears of the progress."""


class Management:
    """Handlers of ``/garrison/v1``: reads for everybody who may connect, changes for managers."""

    def __init__(self, access: ModelAccess, check_manager: Callable[[Request], None]) -> None:
        self._access = access
        self._check_manager = check_manager
        self._carrier: Carrier | None = None

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/garrison/v1/status", self.status)
        book.add("GET", "/garrison/v1/models", self.models)
        book.add("GET", "/garrison/v1/models/{name}", self.model)
        book.add("POST", "/garrison/v1/models/{name}/load", self.load)
        book.add("POST", "/garrison/v1/models/{name}/unload", self.unload)
        book.add("GET", "/garrison/v1/cache", self.cache)
        book.add("DELETE", "/garrison/v1/cache/{name}", self.remove)
        book.add("GET", "/garrison/v1/doctor", self.doctor)
        book.add("POST", "/garrison/v1/bundle", self.begin_import)
        book.add("POST", "/garrison/v1/bundle/{session}", self.carry)
        book.add("POST", "/garrison/v1/export/{cursor}", self.export)

    async def status(self, request: Request) -> None:
        """Answer with a ``StatusView``."""
        await request.answer(await self._access.ask(GetStatus()))

    async def models(self, request: Request) -> None:
        """Answer with a list of ``ModelView``."""
        await request.answer(await self._access.ask(ListModels()))

    async def model(self, request: Request) -> None:
        """Answer with the ``ModelView`` called by alias, id, or package name; one in service before others."""
        views: Any = await self._access.ask(ListModels())
        name = request.params["name"]
        for key in ("alias", "id", "name"):
            matches = [view for view in views if view[key] == name]
            if matches:
                await request.answer(next((view for view in matches if view["serving"]), matches[0]))
                return
        raise unknown_model(name, [view[key] for view in views for key in ("alias", "id")])

    async def load(self, request: Request) -> None:
        """Load a model; answers with a ``LoadResult`` once it serves."""
        self._check_manager(request)
        await request.answer(await self._access.ask(LoadModel(request.params["name"]), LOAD_TIMEOUT_S))

    async def unload(self, request: Request) -> None:
        """End a model's worker; answers with an ``UnloadResult``."""
        self._check_manager(request)
        await request.answer(await self._access.ask(UnloadModel(request.params["name"]), LOAD_TIMEOUT_S))

    async def cache(self, request: Request) -> None:
        """Answer with a ``CacheView``."""
        await request.answer(await self._access.ask(ListCache()))

    async def remove(self, request: Request) -> None:
        """Delete an installed package that nothing uses; answers with a ``RemoveResult``."""
        self._check_manager(request)
        await request.answer(await self._access.ask(RemoveFromCache(request.params["name"])))

    async def doctor(self, request: Request) -> None:
        """Answer with a list of ``Check``."""
        await request.answer(await self._access.ask(Doctor()))

    async def begin_import(self, request: Request) -> None:
        """Begin to import a bundle; answers with the session under which its files are read to the agent."""
        self._check_manager(request)
        carrier = await self._access.ask(BeginImport())
        assert isinstance(carrier, Carrier)
        self._carrier = carrier
        await request.answer({"session": carrier.id})

    async def carry(self, request: Request) -> None:
        """Take a piece of the bundle that the agent asked for, and answer with the next one that it wants.

        ``x-number`` says which question the body answers; with ``x-failed`` it is an error in JSON. The answer is
        ``{"ask": ...}``, ``{"progress": ...}`` when nothing was wanted for a while, or ``{"end": ...}``.
        """
        self._check_manager(request)
        body = await request.body()
        carrier = self._carrier
        if carrier is None or not compare_digest(carrier.id, request.params["session"]):
            raise NotFoundError("bundle.session_unknown", "no such import is under way", hint="begin it again")
        number = request.header(b"x-number")
        if number is not None and number.isdecimal():
            failed = request.header(b"x-failed") is not None
            carrier.answer(int(number), parse_failure(body) if failed else body)
        wanted = await _next(carrier)
        if wanted is not None:
            await request.answer({"ask": asdict(wanted)})
        elif carrier.result is None:
            await request.answer({"progress": carrier.progress})
        elif isinstance(carrier.result, GarrisonError):
            raise carrier.result
        else:
            await request.answer({"end": carrier.result})

    async def export(self, request: Request) -> None:
        """Answer with an ``ExportPage``; the cursor ``-`` begins."""
        self._check_manager(request)
        cursor = request.params["cursor"]
        await request.answer(await self._access.ask(GetExport("" if cursor == "-" else cursor)))


async def _next(carrier: Carrier) -> Wanted | None:
    """Return the next piece that is wanted; None when the import has ended, or nothing was wanted for a while."""
    loop, wake = asyncio.get_running_loop(), asyncio.Event()

    def heard() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(wake.set)

    carrier.listen(heard)
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), POLL_S)
    finally:
        carrier.listen(None)
    return carrier.take()
