"""Foundry Local's management paths, so that its clients work unchanged. As there, GETs load and unload."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from garrison_agent.api.access import LOAD_TIMEOUT_S, ModelAccess
from garrison_agent.api.asgi import Request, RouteBook
from garrison_agent.api.commands import ListCache, LoadModel, UnloadModel


class Foundry:
    """Handlers of ``/status`` and ``/models``. ``endpoints`` are the URLs that the API listens on."""

    def __init__(
        self, access: ModelAccess, endpoints: Callable[[], list[str]], check_manager: Callable[[Request], None]
    ) -> None:
        self._access = access
        self._endpoints = endpoints
        self._check_manager = check_manager

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/status", self.status)
        book.add("GET", "/models/loaded", self.loaded)
        book.add("GET POST", "/models/load/{name}", self.load)
        book.add("GET POST", "/models/unload/{name}", self.unload)

    async def status(self, request: Request) -> None:
        """Answer with where models are kept, where the API listens, and the process id."""
        cache: Any = await self._access.ask(ListCache())
        endpoints = self._endpoints()
        await request.answer({"modelCachePath": cache["location"], "endpoints": endpoints, "pid": os.getpid()})

    async def loaded(self, request: Request) -> None:
        """Answer with the ids of loaded models."""
        await request.answer(sorted({route.model_id for route in self._access.table.routes if route.loaded}))

    async def load(self, request: Request) -> None:
        """Load a model; answers once it serves."""
        self._check_manager(request)
        result: Any = await self._access.ask(LoadModel(request.params["name"]), LOAD_TIMEOUT_S)
        await request.answer({"status": result["outcome"]})

    async def unload(self, request: Request) -> None:
        """End a model's worker."""
        self._check_manager(request)
        result: Any = await self._access.ask(UnloadModel(request.params["name"]), LOAD_TIMEOUT_S)
        await request.answer({"status": result["outcome"]})
