"""Who calls, and who may.

Browsers must not reach the API through a foreign page; an application shows its key; management needs the unix socket,
or the key of an application that may.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from garrison_agent.api.asgi import Caller, Peer, Request
from garrison_agent.api.errors import BadRequestError
from garrison_agent.core.applications import ApplicationTable, is_key
from garrison_protocol.errors import DeniedError, UnauthenticatedError

_SO_PEERGROUPS = 59
"""Linux 4.13; the constant is missing from Python's socket module."""
_MAX_GROUPS = 256
MANAGEMENT = "/garrison/"
"""Paths under it are about the board, not about models that an application may use."""
TIMEOUT_HEADER = b"x-garrison-timeout"
MAX_TIMEOUT_S = 86_400.0


def peer_of(connection: socket.socket) -> Peer:
    """Return who opened ``connection``, a unix socket: pid, uid, and every group, as of its ``connect``."""
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:  # an older kernel, or more groups than fit: the primary group alone counts
        raw = b""
    return Peer(pid=pid, uid=uid, gids=frozenset({gid, *struct.unpack(f"{len(raw) // 4}I", raw)}))


def identify(request: Request, table: ApplicationTable, *, needs_key: bool) -> Caller:
    """Return who sent ``request``. ``needs_key``: TCP is closed to who has no key.

    A key of the form of ours must be one of ours, on every door. Other keys, which clients send because they must send
    something, say nothing.

    Raises:
        UnauthenticatedError: ``api.key_unknown`` or ``api.key_missing``.
    """
    keys = [key for key in _keys(request) if is_key(key)]
    applications = [table.of_key(key) for key in keys]
    if None in applications:
        raise UnauthenticatedError(
            "api.key_unknown",
            "no application has this key; it was removed, or mistyped",
            hint="garrison-agent app list shows the applications, app add makes a new key",
        )
    if applications:
        assert applications[0] is not None
        return Caller(applications[0].name, applications[0])
    if request.peer is not None:
        return Caller(f"uid:{request.peer.uid}")
    if needs_key:
        raise UnauthenticatedError(
            "api.key_missing",
            "this API needs the key of an application",
            hint="send it as 'Authorization: Bearer gsk_...'; garrison-agent app add makes one",
        )
    return Caller()


def _keys(request: Request) -> Iterator[str]:
    scheme, _, credential = (request.header(b"authorization") or "").strip().partition(" ")
    if scheme.lower() == "bearer":
        yield credential.strip()
    yield (request.header(b"x-api-key") or "").strip()


def timeout_s(request: Request, default_s: float | None) -> float | None:
    """Return how many seconds ``request`` may take, by its own word or else ``default_s``; None: as long as it takes.

    Raises:
        BadRequestError: ``api.timeout_malformed``.
    """
    text = request.header(TIMEOUT_HEADER)
    if text is None:
        return default_s
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= MAX_TIMEOUT_S:  # a NaN is refused here, too
        raise BadRequestError(
            "api.timeout_malformed",
            f"the header {TIMEOUT_HEADER.decode()} is no number of seconds up to {MAX_TIMEOUT_S:.0f}",
            hint="send such as 30 or 2.5",
        )
    return value


def check_browser(request: Request, names: Collection[str] = ()) -> None:
    """Refuse what a web page elsewhere could have sent over TCP (DNS rebinding, cross-site requests).

    ``names`` are what the board is called besides, in lower case.

    Raises:
        DeniedError: ``api.host_refused`` or ``api.origin_refused``.
    """
    host = request.header(b"host")
    if host is None or not _is_local(_hostname(f"//{host}"), request.server_host, names):
        raise DeniedError(
            "api.host_refused",
            f"the Host header {host!r} does not name this machine's loopback",
            hint="use http://127.0.0.1 or http://localhost; other names of the board go into api.names",
        )
    origin = request.header(b"origin")
    if origin is None:  # a page's links, images, and frames name none, but browsers say that they come from elsewhere
        foreign = (request.header(b"sec-fetch-site") or "").strip().lower() == "cross-site"
    else:
        foreign = not _is_local(_hostname(origin), request.server_host, names)
    if foreign:
        raise DeniedError(
            "api.origin_refused",
            f"web pages of {origin or 'other sites'!r} may not use this API",
            hint="call it from a program, or from a page served on this machine",
        )


def check_manager(request: Request, socket_path: Path) -> None:
    """Allow root, the agent's own user, members of the socket's group, and applications with an admin key.

    Raises:
        DeniedError: ``api.management_needs_socket`` (the request came over TCP) or ``api.not_permitted``.
    """
    if request.caller.is_admin:
        return
    if request.peer is None:
        raise DeniedError(
            "api.management_needs_socket",
            f"{request.method} {request.path} changes what the agent does, so TCP may not ask for it",
            hint=f"use garrison-agent, the unix socket {socket_path}, or a key made with --admin",
        )
    if request.peer.uid in (0, os.geteuid()):
        return
    group = socket_path.stat().st_gid
    if group not in request.peer.gids:
        raise DeniedError(
            "api.not_permitted",
            f"user {request.peer.uid} is not a member of group {group}, which owns {socket_path}",
            hint="run the command as root, or join the group",
        )


def check_surface(request: Request) -> None:
    """Keep applications that may use models away from what is about the board.

    Raises:
        DeniedError: ``api.management_needs_admin``.
    """
    application = request.caller.application
    if request.peer is not None or application is None or application.admin:
        return
    if request.path.startswith(MANAGEMENT):
        raise DeniedError(
            "api.management_needs_admin",
            f"the key of {application.name} opens models, not the management of the board",
            hint="use a key made with --admin",
        )


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_local(host: str | None, own_address: str, names: Collection[str]) -> bool:
    """Tell whether ``host`` is loopback, one of the board's names, or the address that the connection came in on."""
    if host is None:
        return False
    if host in ("localhost", own_address) or host in names:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
