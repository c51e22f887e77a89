"""Who may call: browsers must not reach the API through a foreign page, and management needs the unix socket."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from pathlib import Path
from urllib.parse import urlsplit

from garrison_agent.api.asgi import Peer, Request
from garrison_protocol.errors import DeniedError

_SO_PEERGROUPS = 59
"""Linux 4.13; the constant is missing from Python's socket module."""
_MAX_GROUPS = 256


def peer_of(connection: socket.socket) -> Peer:
    """Return who opened ``connection``, a unix socket: pid, uid, and every group, as of its ``connect``."""
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:  # an older kernel, or more groups than fit: the primary group alone counts
        raw = b""
    return Peer(pid=pid, uid=uid, gids=frozenset({gid, *struct.unpack(f"{len(raw) // 4}I", raw)}))


def check_browser(request: Request) -> None:
    """Refuse what a web page elsewhere could have sent over TCP (DNS rebinding, cross-site requests).

    Raises:
        DeniedError: ``api.host_refused`` or ``api.origin_refused``.
    """
    host = request.header(b"host")
    if host is None or not _is_local(_hostname(f"//{host}"), request.server_host):
        raise DeniedError(
            "api.host_refused",
            f"the Host header {host!r} does not name this machine's loopback",
            hint="use http://127.0.0.1 or http://localhost",
        )
    origin = request.header(b"origin")
    if origin is not None and not _is_local(_hostname(origin), request.server_host):
        raise DeniedError(
            "api.origin_refused",
            f"web pages of {origin!r} may not use this API",
            hint="call it from a program, or from a page served on this machine",
        )


def check_manager(request: Request, socket_path: Path) -> None:
    """Allow root, the agent's own user, and members of the socket's group.

    Raises:
        DeniedError: ``api.management_needs_socket`` (the request came over TCP) or ``api.not_permitted``.
    """
    if request.peer is None:
        raise DeniedError(
            "api.management_needs_socket",
            f"{request.method} {request.path} changes what the agent does, so TCP may not ask for it",
            hint=f"use garrison-agent, or the unix socket {socket_path}",
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


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_local(host: str | None, own_address: str) -> bool:
    """Tell whether ``host`` is loopback, or the very address that the connection came in on."""
    if host is None:
        return False
    if host in ("localhost", own_address):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
