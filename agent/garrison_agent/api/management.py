"""Garrison's own management surface, ``/garrison/v1``, which the command line speaks over the unix socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from garrison_agent.api.access import LOAD_TIMEOUT_S, ModelAccess
from garrison_agent.api.asgi import Request, RouteBook
from garrison_agent.api.commands import (
    Doctor,
    GetStatus,
    ListCache,
    ListModels,
    LoadModel,
    RemoveFromCache,
    UnloadModel,
    unknown_model,
)


class Management:
    """Handlers of ``/garrison/v1``: reads for everybody who may connect, changes for managers."""

    def __init__(self, access: ModelAccess, check_manager: Callable[[Request], None]) -> None:
        self._access = access
        self._check_manager = check_manager

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
