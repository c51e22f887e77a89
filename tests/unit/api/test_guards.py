from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.api.asgi import BodyBudget, Message, Peer, Request
from garrison_agent.api.guards import check_browser, check_manager, peer_of
from garrison_protocol.errors import DeniedError


def make_request(*, peer: Peer | None = None, server: str = "127.0.0.1", **headers: str) -> Request:
    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope: dict[str, Any] = {"method": "POST", "path": "/x", "headers": pairs, "server": (server, 5273)}
    return Request(scope, receive, send, BodyBudget(), peer)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:5273", "127.9.9.9", "localhost", "LOCALHOST:1", "[::1]:5273"])
def test_loopback_hosts_pass(host: str) -> None:
    check_browser(make_request(host=host))


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "", "[", "@", ":80"],
)
def test_other_hosts_are_refused(host: str) -> None:
    with pytest.raises(DeniedError) as caught:
        check_browser(make_request(host=host))
    assert caught.value.code == "api.host_refused"


def test_a_missing_host_is_refused() -> None:
    with pytest.raises(DeniedError, match=r"api\.host_refused"):
        check_browser(make_request())


def test_an_api_bound_to_an_address_is_called_by_it() -> None:
    check_browser(make_request(server="10.0.0.7", host="10.0.0.7:5273"))
    with pytest.raises(DeniedError):
        check_browser(make_request(server="10.0.0.7", host="10.0.0.8:5273"))


@pytest.mark.parametrize(
    ("origin", "passes"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:3000", True),
        ("null", False),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://localhost@evil.example", False),
        ("localhost", False),
        ("http://[", False),
    ],
)
def test_origins(origin: str, passes: bool) -> None:
    request = make_request(host="localhost", origin=origin)
    if passes:
        check_browser(request)
    else:
        with pytest.raises(DeniedError, match=r"api\.origin_refused"):
            check_browser(request)


def test_managers_are_root_the_agents_user_and_the_sockets_group(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    path.touch()
    group = path.stat().st_gid
    stranger = os.geteuid() + 12345
    for peer in (
        Peer(1, 0, frozenset({9})),
        Peer(1, os.geteuid(), frozenset({group + 1})),
        Peer(1, stranger, frozenset({group + 1, group})),
    ):
        check_manager(make_request(peer=peer), path)
    with pytest.raises(DeniedError) as denied:
        check_manager(make_request(peer=Peer(1, stranger, frozenset({group + 1}))), path)
    assert denied.value.code == "api.not_permitted"
    with pytest.raises(DeniedError) as over_tcp:
        check_manager(make_request(), path)
    assert over_tcp.value.code == "api.management_needs_socket"


def test_the_kernel_says_who_connected() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        peer = peer_of(here)
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert {os.getegid(), *os.getgroups()} <= peer.gids
