"""The local API as one ASGI application per door: TCP for inference, the unix socket for everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.asgi import BodyBudget, ClientGoneError, Peer, Receive, Request, RouteBook, Scope, Send
from garrison_agent.api.errors import RETRY_AFTER_S, TooLargeError, http_status, oip_body, openai_body, stopping
from garrison_agent.api.foundry import Foundry
from garrison_agent.api.guards import check_browser, check_manager
from garrison_agent.api.inference_protocol import InferenceProtocol
from garrison_agent.api.management import Management
from garrison_agent.api.openai import OpenAI
from garrison_protocol.errors import GarrisonError

PEER_STATE = "garrison.peer"
"""Key in the ASGI scope's ``state`` under which the unix door puts the ``Peer``."""


class LocalApp:
    """All surfaces. One instance serves both doors: requests with a ``Peer`` came through the unix socket."""

    def __init__(self, access: ModelAccess, socket: Path, endpoints: Callable[[], list[str]]) -> None:
        self._budget = BodyBudget()
        self._book = RouteBook()

        def manager(request: Request) -> None:
            check_manager(request, socket)

        OpenAI(access).add_to(self._book)
        InferenceProtocol(access).add_to(self._book)
        Foundry(access, endpoints, manager).add_to(self._book)
        Management(access, manager).add_to(self._book)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request. Exceptions other than ``GarrisonError`` are bugs; the server logs them."""
        peer: Peer | None = scope["state"].get(PEER_STATE)
        request = Request(scope, receive, send, self._budget, peer)
        try:
            if peer is None:
                check_browser(request)
            await self._book.find(request)(request)
        except ClientGoneError:
            return
        except asyncio.CancelledError:  # the server is shutting down and its grace is over
            if not request.started:
                await _refuse(request, stopping())
        except GarrisonError as error:
            if request.started:
                raise
            await _refuse(request, error)
        finally:
            await request.close()


async def _refuse(request: Request, error: GarrisonError) -> None:
    headers = []
    if http_status(error) == 503 and error.retryable:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    if isinstance(error, TooLargeError):
        headers.append((b"connection", b"close"))  # the rest of the body would be read in vain
    if request.path.startswith("/v1/"):
        await request.answer(openai_body(error), http_status(error), headers)
    elif request.path.startswith("/v2/"):
        await request.answer(oip_body(error), http_status(error), headers)
    else:
        await request.answer(error.to_dict(), error.http_status, headers)
