"""A worker's HTTP server: uvicorn on a unix socket that only its own user can open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

from garrison_agent.http_server import Config, Server
from garrison_agent.runtimes.asgi import Application, Receive, Scope, Send

_TICK_S = 5.0
"""Of uvicorn's housekeeping (its Date header); its own ten a second would wake an idle board for nothing."""
_DRAIN_S = 60


class _Server(Server):
    """Uvicorn without its own signal handling, and with a slow idle tick."""

    def __init__(self, config: Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to ``serve``."""
        yield

    def request_stop(self) -> None:
        """Finish what runs, accept nothing new."""
        self.should_exit = True
        self._stop.set()

    async def main_loop(self) -> None:
        """Wait for the end."""
        self._on_listening()
        counter = 0
        while not await self.on_tick(counter):
            counter += 10  # on_tick refreshes the Date header at multiples of ten
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _TICK_S)


async def serve(application: Application, path: str, on_listening: Callable[[], None]) -> None:
    """Serve ``application`` on the unix socket ``path`` until SIGTERM, then finish the requests that run.

    Raises:
        OSError: The socket cannot be bound.
    """
    listener = bind(path)

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await application(scope, receive, send)

    config = Config(
        asgi,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    server = _Server(config, on_listening)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.request_stop)
    await server.serve(sockets=[listener])


def bind(path: str) -> socket.socket:
    """Return a listening socket at ``path`` with mode 0600 from its first moment on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener
