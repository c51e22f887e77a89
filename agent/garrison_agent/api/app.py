"""The local API as one ASGI application per door: TCP for inference, the unix socket for everything."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from garrison_agent.api.access import CALLER, ModelAccess
from garrison_agent.api.asgi import BodyBudget, ClientGoneError, Peer, Receive, Request, RouteBook, Scope, Send
from garrison_agent.api.connection import PEER_STATE
from garrison_agent.api.errors import (
    TooLargeError,
    TooSlowError,
    http_status,
    oip_body,
    ollama_body,
    openai_body,
    retry_after_s,
    stopping,
)
from garrison_agent.api.foundry import Foundry
from garrison_agent.api.guards import MANAGEMENT, check_browser, check_manager, check_surface, identify, timeout_s
from garrison_agent.api.inference_protocol import InferenceProtocol
from garrison_agent.api.management import Management
from garrison_agent.api.openai import OpenAI
from garrison_agent.core.applications import ApplicationTable
from garrison_protocol.errors import GarrisonError, UnauthenticatedError, UnavailableError

MAX_REQUESTS = 128
"""In progress at one door, besides those that manage the board."""


@dataclass(frozen=True)
class TcpRules:
    """What holds for TCP alone. ``names`` (lower case) are what the board is called besides loopback."""

    needs_key: bool = False
    names: frozenset[str] = frozenset()


class LocalApp:
    """All surfaces. One instance serves both doors: requests with a ``Peer`` came through the unix socket."""

    def __init__(
        self,
        access: ModelAccess,
        socket: Path,
        endpoints: Callable[[], list[str]],
        *,
        applications: Callable[[], ApplicationTable],
        tcp: TcpRules,
        request_timeout_s: float | None = None,
    ) -> None:
        self._applications = applications
        self._tcp = tcp
        self._request_timeout_s = request_timeout_s
        self._running: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._budget = BodyBudget()
        self._book = RouteBook()

        def manager(request: Request) -> None:
            check_manager(request, socket)

        OpenAI(access).add_to(self._book)
        InferenceProtocol(access).add_to(self._book)
        Foundry(access, endpoints, manager).add_to(self._book)
        Management(access, manager).add_to(self._book)

        def ollama(book: RouteBook) -> None:
            from garrison_agent.api.ollama import Ollama

            Ollama(access, manager).add_to(book)

        def foundry_older(book: RouteBook) -> None:
            from garrison_agent.api.foundry_older import FoundryOlder

            FoundryOlder(access, endpoints, manager).add_to(book)

        def apps(book: RouteBook) -> None:
            from garrison_agent.api.applications import ApplicationsApi

            ApplicationsApi(access, manager).add_to(book)

        def metrics(book: RouteBook) -> None:
            from garrison_agent.api.metrics import Metrics

            Metrics(access, self._refused, self._running).add_to(book)

        def description(book: RouteBook) -> None:
            from garrison_agent.api.openapi import Description

            Description().add_to(book)

        self._book.add_rare(r"/openapi\.json", description)
        self._book.add_rare(r"/garrison/v1/apps(/.*)?", apps)
        self._book.add_rare(r"/metrics", metrics)
        self._book.add_rare(r"/(api/.*)?", ollama)
        self._book.add_rare(r"/(openai|foundry)/.*|/v1/chat/completions/tokenizer/.*", foundry_older)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request. Exceptions other than ``GarrisonError`` are bugs; the server logs them."""
        peer: Peer | None = scope["state"].get(PEER_STATE)
        request = Request(scope, receive, send, self._budget, peer)
        try:
            self._let_in(request)
            await self._book.find(request)(request)
        except ClientGoneError:
            return
        except asyncio.CancelledError:  # the server is shutting down and its grace is over
            if not request.started:
                await _refuse(request, stopping())
        except GarrisonError as error:
            if request.started:
                raise
            self._refused[error.code] += 1
            await _refuse(request, error)
        finally:
            await request.close()

    def _let_in(self, request: Request) -> None:
        """Find out who asks, and for how long there is time.

        Raises:
            GarrisonError: The caller is not welcome, or there are too many.
        """
        if request.peer is None:
            check_browser(request, self._tcp.names)
        request.caller = identify(request, self._applications(), needs_key=self._tcp.needs_key)
        CALLER.set(request.caller)
        check_surface(request)
        self._count(request)
        limit_s = timeout_s(request, self._request_timeout_s)
        if limit_s is not None:
            request.deadline_s = asyncio.get_running_loop().time() + limit_s

    def _count(self, request: Request) -> None:
        if request.path.startswith(MANAGEMENT):
            return
        door = "tcp" if request.peer is None else "unix"
        if self._running[door] >= MAX_REQUESTS:
            raise UnavailableError(
                "api.overloaded",
                f"{MAX_REQUESTS} requests are in progress already",
                hint="wait as long as Retry-After says",
                retryable=True,
            )
        self._running[door] += 1
        request.at_close(lambda: self._running.subtract((door,)))


async def _refuse(request: Request, error: GarrisonError) -> None:
    headers = []
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers.append((b"retry-after", str(wait_s).encode()))
    if isinstance(error, UnauthenticatedError):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, TooLargeError | TooSlowError | UnauthenticatedError):
        headers.append((b"connection", b"close"))  # the rest of the body would be read in vain
    if request.path.startswith("/v1/"):
        await request.answer(openai_body(error), http_status(error), headers)
    elif request.path.startswith("/api/"):
        await request.answer(ollama_body(error), http_status(error), headers)
    elif request.path.startswith("/v2/"):
        await request.answer(oip_body(error), http_status(error), headers)
    else:
        await request.answer(error.to_dict(), error.http_status, headers)
