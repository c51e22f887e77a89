"""The local API's thread: one event loop, a TCP door (on loopback, unless it has TLS), and a door on a unix socket."""

from __future__ import annotations

import asyncio
import errno
import socket as socketlib
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from garrison_agent.api.access import LOAD_TIMEOUT_S, ModelAccess
from garrison_agent.api.admission import Admission
from garrison_agent.api.app import LocalApp, TcpRules
from garrison_agent.api.commands import Post
from garrison_agent.api.connection import ClientConnection, UnixConnection
from garrison_agent.api.routes import RouteTable
from garrison_agent.api.traffic import Traffic
from garrison_agent.core.applications import ApplicationTable
from garrison_agent.http_server import Config, Server
from garrison_protocol.errors import GarrisonError, UnavailableError

if TYPE_CHECKING:  # a board without upstreams does without
    from garrison_agent.api.upstreams import Upstreams

SOCKET_MODE = 0o660
_BACKLOG = 512
_GRACE_S = 3
_FAREWELL_S = 1.0


@dataclass(frozen=True)
class _Door:
    listener: socketlib.socket
    connection: type[ClientConnection]
    tls: ssl.SSLContext | None = None


class LocalApi:
    """Serves the local API until ``stop``.

    ``table`` is called on the API's thread for every request and must only return a reference; ``command`` must only
    enqueue. ``socket``'s folder must exist; the file is made with mode 0660, so its group decides who may connect.
    ``applications`` is read like ``table``. ``tcp_keys``: TCP needs the key of one. ``tls``: paths of certificate chain
    and key, for TCP. ``names``: what clients may call the board over TCP, besides loopback and its addresses.
    ``request_timeout_s``: how long requests may take that do not say so themselves. ``upstreams``: other servers to
    offer; None: none.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        tcp_open: bool,
        socket: Path,
        table: Callable[[], RouteTable],
        command: Post,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        traffic: Traffic | None = None,
        applications: Callable[[], ApplicationTable] = ApplicationTable,
        tcp_keys: bool = False,
        tls: tuple[Path, Path] | None = None,
        names: tuple[str, ...] = (),
        request_timeout_s: float | None = None,
        upstreams: Upstreams | None = None,
    ) -> None:
        self._address = (host, port)
        self._tcp_open = tcp_open
        self._socket = socket
        self._tls = tls
        self._names = names
        self._endpoints: list[str] = []
        access = ModelAccess(
            table, command, load_timeout_s, traffic=traffic, admission=Admission(applications), upstreams=upstreams
        )
        self._app = LocalApp(
            access,
            socket,
            lambda: self._endpoints,
            applications=applications,
            tcp=TcpRules(tcp_keys, frozenset(name.lower() for name in names)),
            request_timeout_s=request_timeout_s,
        )
        self._servers: list[ApiServer] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def endpoints(self) -> list[str]:
        """The URLs of the TCP door, once started; empty when it is off."""
        return list(self._endpoints)

    def start(self) -> None:
        """Listen, and return when both doors accept connections.

        Raises:
            UnavailableError: ``api.port_in_use``, ``api.address_unusable``, or ``api.socket_in_use``.
            InvalidError: ``api.tls_unusable``.
            RefusedError: ``key.readable_by_others``.
        """
        doors: list[_Door] = []
        if self._tcp_open:
            doors.append(self._tcp_door())
        try:
            doors.append(_Door(_listen_unix(self._socket), UnixConnection))
        except GarrisonError:
            for door in doors:
                door.listener.close()
            raise
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(doors, ready), name="local-api", daemon=True)
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """Stop listening, give open requests a few seconds, and return when the thread has ended."""
        if self._thread is None or self._loop is None:
            return
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._request_stop)
            self._thread.join()
        self._thread = None
        self._socket.unlink(missing_ok=True)

    def _tcp_door(self) -> _Door:
        tls = None
        if self._tls is not None:
            from garrison_agent.api.tls_server import server_context

            tls = server_context(*self._tls)
        listener = _listen_tcp(*self._address)
        address, port = listener.getsockname()[:2]
        host = self._names[0] if self._names else address
        self._endpoints = [f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"]
        return _Door(listener, ClientConnection, tls)

    def _request_stop(self) -> None:
        for server in self._servers:
            server.stopping.set()

    def _run(self, doors: list[_Door], ready: threading.Event) -> None:
        try:
            asyncio.run(self._serve(doors, ready))
        finally:
            ready.set()  # whoever starts us must not wait for ever; the exception reaches threading.excepthook

    async def _serve(self, doors: list[_Door], ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._servers = [_server(self._app, door) for door in doors]
        ready.set()  # both sockets listen already; the kernel queues connections until they are accepted
        await asyncio.gather(
            *(server.serve([door.listener]) for server, door in zip(self._servers, doors, strict=True))
        )


def _server(app: LocalApp, door: _Door) -> ApiServer:
    config = _configure(app, door.connection)
    if door.tls is None:
        return ApiServer(config)
    from garrison_agent.api.tls_server import TlsServer

    return TlsServer(config, door.tls)


class ApiServer(Server):
    """uvicorn without its ten wake-ups a second, which would be most of an idle agent's CPU time."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        await self.stopping.wait()

    async def shutdown(self, sockets: list[socketlib.socket] | None = None) -> None:
        await super().shutdown(sockets)
        cut_short = set(self.server_state.tasks)
        if cut_short:  # uvicorn has cancelled them; let them tell their clients why
            await asyncio.wait(cut_short, timeout=_FAREWELL_S)


def _configure(app: LocalApp, connection: type[ClientConnection]) -> Config:
    config: Any = {"app": app, "http": connection}
    return Config(
        **config,
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE_S,
    )


def _listen_tcp(host: str, port: int) -> socketlib.socket:
    family = socketlib.AF_INET6 if ":" in host else socketlib.AF_INET
    listener = socketlib.socket(family, socketlib.SOCK_STREAM)
    try:
        listener.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        code = "api.port_in_use" if error.errno == errno.EADDRINUSE else "api.address_unusable"
        raise UnavailableError(
            code,
            f"the local API cannot listen on {host}:{port}: {error.strerror}",
            hint="stop what uses it, or set another [api] port in agent.toml",
            host=host,
            port=port,
        ) from error
    return listener


def _listen_unix(path: Path) -> socketlib.socket:
    if path.is_socket():
        _remove_stale(path)
    listener = socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)  # before listen(): nobody connects under the umask's mode
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UnavailableError(
            "api.address_unusable",
            f"the local API cannot listen on {path}: {error.strerror or error}",
            hint="check that runtime_dir in agent.toml exists, is writable, and has a path below 90 bytes",
            socket=str(path),
        ) from error
    return listener


def _remove_stale(path: Path) -> None:
    with socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise UnavailableError(
        "api.socket_in_use",
        f"another agent answers on {path}",
        hint="stop it first: systemctl stop garrison-agent",
        socket=str(path),
    )
