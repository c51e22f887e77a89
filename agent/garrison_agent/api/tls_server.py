"""The TCP door with TLS, for other machines: what is not authenticated yet costs little, and not for long.

asyncio's own server would hold any number of connections for a minute each, while their handshakes have not ended.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import Any

from garrison_agent.api.server import ApiServer
from garrison_agent.http_server import Config
from garrison_protocol.errors import InvalidError
from garrison_protocol.keys import refuse_if_readable_by_others

MAX_HANDSHAKES = 64
"""Under way; beyond, the oldest gives way: honest ones end in milliseconds."""
HANDSHAKE_S = 10.0
_NO_ROOM_S = 1.0

_log = logging.getLogger(__name__)


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the settings to serve with, at least TLS 1.2.

    Raises:
        InvalidError: ``api.tls_unusable``; a file cannot be read, or they do not belong together.
        RefusedError: ``key.readable_by_others``.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        refuse_if_readable_by_others(key)
        context.load_cert_chain(certificate, key, password=lambda: "")  # else OpenSSL would ask at the terminal
    except OSError as error:  # an ssl.SSLError is one
        raise InvalidError(
            "api.tls_unusable",
            f"{certificate} and {key} cannot be served with: {error.strerror or error}",
            hint="api.tls_certificate is the chain and api.tls_key its key, in PEM, unencrypted, readable by the agent",
        ) from error
    return context


class TlsServer(ApiServer):
    """Accepts by itself, and hands on what has shaken hands."""

    def __init__(self, config: Config, context: ssl.SSLContext) -> None:
        super().__init__(config)
        self._context = context
        self._handshakes: dict[asyncio.Task[bool], None] = {}
        """In the order of their begin."""
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept on the one listening socket in ``sockets``."""
        assert sockets is not None
        await self.lifespan.startup()
        self.servers = []
        (listener,) = sockets
        listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(listener))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end what is under way."""
        assert self._accepting is not None
        ending: list[asyncio.Task[Any]] = [self._accepting, *self._handshakes]
        for task in ending:
            task.cancel()
        await asyncio.wait(ending)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no more descriptors; or the client has gone already
                _log.warning("no connection could be accepted: %s", error)
                await asyncio.sleep(_NO_ROOM_S)
                continue
            if len(self._handshakes) >= MAX_HANDSHAKES:
                oldest = next(iter(self._handshakes))
                del self._handshakes[oldest]
                oldest.cancel()
            task = asyncio.create_task(self._shake_hands(connection))
            self._handshakes[task] = None
            task.add_done_callback(partial(self._shaken, connection))

    async def _shake_hands(self, connection: socket.socket) -> bool:
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._connection, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_S
            )
        except OSError:  # no TLS, none that we speak, or too slow: nobody to tell
            return False
        return True

    def _shaken(self, connection: socket.socket, task: asyncio.Task[bool]) -> None:
        self._handshakes.pop(task, None)
        if task.cancelled() or not task.result():
            connection.close()

    def _connection(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg] # as uvicorn's own
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made
