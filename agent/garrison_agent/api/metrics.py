"""``GET /metrics`` for Prometheus: what the agent measured, and what its workers say of this moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httptools

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.asgi import Request, RouteBook
from garrison_agent.api.commands import GetMetrics
from garrison_agent.api.relay import connect
from garrison_agent.api.routes import Route
from garrison_agent.core.exposition import CONTENT_TYPE, MODEL_LABEL, Family, Sample, render

HEALTH_S = 1.0
"""How long a worker has to answer; one that does not is left out."""
_MAX_ANSWER_BYTES = 64 * 1024


class Metrics:
    """The handler of ``/metrics``. Who may not use a model does not see its numbers."""

    def __init__(self, access: ModelAccess, refused: Mapping[str, int], running: Mapping[str, int]) -> None:
        """``refused`` counts refusals by their code, ``running`` the requests in progress by door."""
        self._access = access
        self._refused = refused
        self._running = running

    def add_to(self, book: RouteBook) -> None:
        """Register the path."""
        book.add("GET", "/metrics", self.metrics)

    async def metrics(self, request: Request) -> None:
        """Answer with the page in text format 0.0.4."""
        measured: Any = await self._access.ask(GetMetrics())
        routes = self._access.table.routes
        aliases = {route.alias for route in routes}
        families = [family.only(aliases.__contains__) for family in measured]
        page = render([*families, await self._workers(routes), *self._own()]).encode()
        length = str(len(page)).encode()
        await request.start(200, [(b"content-type", CONTENT_TYPE), (b"content-length", length)])
        await request.end(page)

    def _own(self) -> list[Family]:
        return [
            Family(
                "garrison_api_requests_in_progress",
                "gauge",
                "Requests that the local API is answering",
                tuple(Sample({"door": door}, count) for door, count in sorted(self._running.items())),
            ),
            Family(
                "garrison_api_refusals_total",
                "counter",
                "Requests that the local API refused, by error code",
                tuple(Sample({"code": code}, count) for code, count in sorted(self._refused.items())),
            ),
        ]

    async def _workers(self, routes: tuple[Route, ...]) -> Family:
        loaded = [route for route in routes if route.socket is not None]
        states = await asyncio.gather(*(_health(route) for route in loaded))
        samples = [
            Sample({MODEL_LABEL: route.alias, "state": state}, health[key])
            for route, health in zip(loaded, states, strict=True)
            for state, key in (("active", "active"), ("waiting", "queued"))
            if isinstance(health.get(key), int)
        ]
        return Family("garrison_worker_requests", "gauge", "Requests at a model's worker", tuple(samples))


async def _health(route: Route) -> dict[str, Any]:
    """Return what the route's worker says of itself; nothing where it says nothing in time."""
    assert route.socket is not None
    answer = _Body()
    try:
        async with asyncio.timeout(HEALTH_S):
            upstream = await connect(route.socket)
            try:
                upstream.writer.write(b"GET /health HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n")
                data = await upstream.reader.read(_MAX_ANSWER_BYTES)
                parser = httptools.HttpResponseParser(answer)
                while data and not answer.complete:
                    parser.feed_data(data)
                    if answer.complete or len(answer.body) > _MAX_ANSWER_BYTES:
                        break
                    data = await upstream.reader.read(_MAX_ANSWER_BYTES)
            finally:
                upstream.abort()
        health = json.loads(answer.body)
    except (OSError, ValueError, RecursionError, httptools.HttpParserError):  # a TimeoutError is an OSError
        return {}
    return health if isinstance(health, dict) else {}


class _Body:
    """What httptools has parsed of an answer; the method names are its callbacks."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True
