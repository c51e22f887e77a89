from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.api.asgi import BodyBudget, Caller, Message, Peer, Request
from garrison_agent.api.errors import BadRequestError
from garrison_agent.api.guards import check_browser, check_manager, check_surface, identify, peer_of, timeout_s
from garrison_agent.core.applications import Application, ApplicationTable, key_digest
from garrison_protocol.errors import DeniedError, UnauthenticatedError

KEY = "gsk_" + "ab" * 32
CAMERA = Application("camera", key_digest(KEY), 0)
CONSOLE = Application("console", key_digest("gsk_admin"), 0, admin=True)
TABLE = ApplicationTable((CAMERA, CONSOLE))


def make_request(*, peer: Peer | None = None, server: str = "127.0.0.1", **headers: Any) -> Request:
    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
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


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "Cross-Site", "sec_fetch_mode": "no-cors", "sec_fetch_dest": "image"}, False),
        ({"sec_fetch_site": "none"}, True),  # typed into the address bar
        ({"sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "cross-site", "origin": "http://localhost:3000"}, True),  # localhost asks 127.0.0.1
        ({"sec_fetch_site": "same-origin", "origin": "https://evil.example"}, False),
    ],
)
def test_a_foreign_page_cannot_get_what_changes_something(headers: dict[str, Any], passes: bool) -> None:
    """``<img src=http://127.0.0.1:5273/v2/models/files>`` sends no Origin, and would load a model."""
    request = make_request(host="127.0.0.1", **headers)
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


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer   {KEY} "},
        {"x_api_key": KEY},
        {"authorization": "Bearer ollama", "x_api_key": KEY},
        {"authorization": "Basic YTpi", "x_api_key": KEY},
    ],
)
@pytest.mark.parametrize("peer", [None, Peer(1, 7, frozenset())])
def test_a_key_names_its_application_on_every_door(headers: dict[str, Any], peer: Peer | None) -> None:
    for needs_key in (True, False):
        caller = identify(make_request(peer=peer, **headers), TABLE, needs_key=needs_key)
        assert caller == Caller("camera", CAMERA)
        assert not caller.is_admin


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer none"}, {"x_api_key": "EMPTY"}])
def test_placeholders_say_nothing(headers: dict[str, Any]) -> None:
    assert identify(make_request(**headers), TABLE, needs_key=False) == Caller("local")
    peer = Peer(1, 7, frozenset())
    assert identify(make_request(peer=peer, **headers), TABLE, needs_key=True) == Caller("uid:7")
    with pytest.raises(UnauthenticatedError, match=r"api\.key_missing"):
        identify(make_request(**headers), TABLE, needs_key=True)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer gsk_wrong"},
        {"x_api_key": "gsk_"},
        {"authorization": f"Bearer {KEY}", "x_api_key": "gsk_wrong"},
        {"authorization": f"Bearer {KEY}0"},
    ],
)
@pytest.mark.parametrize("peer", [None, Peer(1, 0, frozenset())])
def test_a_wrong_key_is_never_ignored(headers: dict[str, Any], peer: Peer | None) -> None:
    for needs_key in (True, False):
        with pytest.raises(UnauthenticatedError, match=r"api\.key_unknown"):
            identify(make_request(peer=peer, **headers), TABLE, needs_key=needs_key)


def test_an_admin_key_manages_over_tcp_and_another_does_not(tmp_path: Path) -> None:
    request = make_request(authorization="Bearer gsk_admin")
    request.caller = identify(request, TABLE, needs_key=True)
    check_manager(request, tmp_path / "agent.sock")
    request.caller = Caller("camera", CAMERA)
    with pytest.raises(DeniedError, match=r"api\.management_needs_socket"):
        check_manager(request, tmp_path / "agent.sock")


def test_a_key_for_models_does_not_open_the_management(tmp_path: Path) -> None:
    request = make_request()
    request.path = "/garrison/v1/status"
    check_surface(request)
    request.caller = Caller("console", CONSOLE)
    check_surface(request)
    request.caller = Caller("camera", CAMERA)
    with pytest.raises(DeniedError, match=r"api\.management_needs_admin"):
        check_surface(request)
    request.path = "/v1/models"
    check_surface(request)


def test_the_boards_own_names_are_welcome() -> None:
    names = frozenset({"board.example"})
    check_browser(make_request(host="BOARD.example:5273", origin="https://board.example"), names)
    odd: list[dict[str, Any]] = [
        {"host": "x.board.example"},
        {"host": "board.example", "origin": "https://evil.example"},
    ]
    for headers in odd:
        with pytest.raises(DeniedError):
            check_browser(make_request(**headers), names)


def test_how_long_a_request_may_take() -> None:
    assert timeout_s(make_request(), None) is None
    assert timeout_s(make_request(), 30.0) == 30.0
    assert timeout_s(make_request(x_garrison_timeout="2.5"), 30.0) == 2.5
    for odd in ("", "0", "-1", "nan", "inf", "1e9", "soon", "1,5"):
        with pytest.raises(BadRequestError, match=r"api\.timeout_malformed"):
            timeout_s(make_request(x_garrison_timeout=odd), None)
