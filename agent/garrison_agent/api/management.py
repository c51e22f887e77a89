"""Garrison's own management surface, ``/garrison/v1``, which the command line speaks over the unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict
from hmac import compare_digest
from typing import TYPE_CHECKING, Any

from garrison_agent.api.access import LOAD_TIMEOUT_S, ModelAccess
from garrison_agent.api.asgi import Request, RouteBook, parse_object
from garrison_agent.api.carrier import Carrier, Wanted, parse_failure
from garrison_agent.api.commands import (
    BeginImport,
    CheckCache,
    Doctor,
    GetExport,
    GetStatus,
    GetVariants,
    ListCache,
    ListLoaded,
    ListModels,
    LoadModel,
    RemoveFromCache,
    UnloadModel,
    unknown_model,
)
from garrison_agent.api.errors import BadRequestError
from garrison_protocol.errors import GarrisonError, NotFoundError

if TYPE_CHECKING:  # an idle board does without
    from garrison_agent.api.cache_check import CacheCheck

POLL_S = 1.0
"""How long a reader of a bundle waits for the next question before it hears of the progress."""


class Management:
    """Handlers of ``/garrison/v1``: reads for everybody who may connect, changes for managers."""

    def __init__(self, access: ModelAccess, check_manager: Callable[[Request], None]) -> None:
        self._access = access
        self._check_manager = check_manager
        self._carrier: Carrier | None = None
        self._cache_check: CacheCheck | None = None

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/garrison/v1/status", self.status)
        book.add("GET", "/garrison/v1/models", self.models)
        book.add("GET", "/garrison/v1/models/{name}", self.model)
        book.add("GET", "/garrison/v1/models/{name}/variants", self.variants)
        book.add("GET", "/garrison/v1/models/{name}/manifest", self.manifest)
        book.add("GET", "/garrison/v1/loaded", self.loaded)
        book.add("POST", "/garrison/v1/models/{name}/load", self.load)
        book.add("POST", "/garrison/v1/models/{name}/unload", self.unload)
        book.add("GET", "/garrison/v1/cache", self.cache)
        book.add("DELETE", "/garrison/v1/cache/{name}", self.remove)
        book.add("POST", "/garrison/v1/cache-check", self.begin_check)
        book.add("GET", "/garrison/v1/cache-check/{id}", self.check)
        book.add("DELETE", "/garrison/v1/cache-check/{id}", self.cancel_check)
        book.add("GET", "/garrison/v1/doctor", self.doctor)
        book.add("POST", "/garrison/v1/bundle", self.begin_import)
        book.add("POST", "/garrison/v1/bundle/{session}", self.carry)
        book.add("POST", "/garrison/v1/export/{cursor}", self.export)

    async def status(self, request: Request) -> None:
        """Answer with a ``StatusView``."""
        view: Any = await self._access.ask(GetStatus())
        upstreams = await self._access.upstream_views()
        await request.answer({**view, "upstreams": upstreams} if upstreams else view)

    async def models(self, request: Request) -> None:
        """Answer with a list of ``ModelView``."""
        await request.answer(await self._models())

    async def model(self, request: Request) -> None:
        """Answer with the ``ModelView`` called by alias, id, or package name; one in service before others."""
        views = await self._models()
        name = request.params["name"]
        for key in ("alias", "id", "name"):
            matches = [view for view in views if view[key] == name]
            if matches:
                await request.answer(next((view for view in matches if view["serving"]), matches[0]))
                return
        raise unknown_model(name, [view[key] for view in views for key in ("alias", "id")])

    async def _models(self) -> list[Any]:
        """Return a ``ModelView`` of each package, and of each upstream."""
        views: Any = await self._access.ask(ListModels())
        upstreams = await self._access.upstream_views()
        if not upstreams:
            return list(views)
        from garrison_agent.api.upstreams import model_view

        return [*views, *map(model_view, upstreams)]

    async def variants(self, request: Request) -> None:
        """Answer with a ``VariantsView``."""
        await request.answer(await self._access.ask(GetVariants(request.params["name"])))

    async def manifest(self, request: Request) -> None:
        """Answer with the manifest of a model in service, as it was signed."""
        await request.answer(self._access.find(request.params["name"]).manifest.model_dump(mode="json"))

    async def loaded(self, request: Request) -> None:
        """Answer with a list of ``RunningView``."""
        await request.answer(await self._access.ask(ListLoaded()))

    async def load(self, request: Request) -> None:
        """Load a model; answers with a ``LoadResult`` once it serves. The body may have ``keep_alive_s``."""
        self._check_manager(request)
        keep_alive_s = _keep_alive_s(await request.body())
        command = LoadModel(request.params["name"], keep_alive_s)
        await request.answer(await self._access.ask(command, LOAD_TIMEOUT_S))

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

    async def begin_check(self, request: Request) -> None:
        """Begin to read installed files back; answers with a ``CacheCheckView``. Body: ``name``, ``repair``."""
        from garrison_agent.api.cache_check import CacheCheck

        self._check_manager(request)
        body = await request.body()
        asked = parse_object(body) if body else {}
        name = asked.get("name")
        command = CheckCache(None if name is None else str(name), repair=asked.get("repair") is True)
        check = await self._access.ask(command)
        assert isinstance(check, CacheCheck)
        self._cache_check = check
        await request.answer(check.view)

    async def check(self, request: Request) -> None:
        """Answer with the ``CacheCheckView`` of this moment."""
        await request.answer(self._find_check(request).view)

    async def cancel_check(self, request: Request) -> None:
        """Let a check end; answers with its ``CacheCheckView``."""
        self._check_manager(request)
        check = self._find_check(request)
        check.cancel()
        await request.answer(check.view)

    def _find_check(self, request: Request) -> CacheCheck:
        check = self._cache_check
        if check is None or check.id != request.params["id"]:
            raise NotFoundError("cache.check_unknown", "no such check was begun", hint="garrison-agent cache verify")
        return check

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
        if carrier is None or not compare_digest(carrier.id.encode(), request.params["session"].encode()):
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


def _keep_alive_s(body: bytes) -> float | None:
    value = parse_object(body).get("keep_alive_s") if body else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        raise BadRequestError("api.bad_json", "keep_alive_s is no number", hint="seconds; 0: at once, -1: never")
    return value


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
