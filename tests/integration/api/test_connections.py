"""Connections that behave badly, or that are many: bounded, answered in form, and no trouble to others."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from garrison_agent.api import app, connection
from garrison_agent.api.asgi import MAX_BODY_BYTES
from garrison_agent.cli.client import AgentClient
from tests.fakes.api_site import DEADLINE_S, LAST, LIST, Site, chat_request, parse_answer, read_answer, read_to_end
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.worker_server import StandInWorker
from tests.integration.api.conftest import Open

pytestmark = pytest.mark.integration


@pytest.fixture
def site(open_site: Open, worker: StandInWorker) -> Site:
    return open_site(LocalOwner(make_route(socket=worker.path), answer=lambda command: {"device": "edge-1"}))


@contextmanager
def many(site: Site, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(site.raw()) for _ in range(count)]


TOO_LARGE = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)
)
"""Refused before its body has come."""


def keep_sending(client: socket.socket, for_s: float = DEADLINE_S) -> None:
    ends_s = time.monotonic() + for_s
    while time.monotonic() < ends_s:
        client.sendall(b"x")
        time.sleep(0.01)


def test_500_connections_at_once_are_all_answered(site: Site) -> None:
    with many(site, 500) as connections:
        for one in connections:
            one.sendall(LAST)
        answers = [parse_answer(read_to_end(one)) for one in connections]
    assert {status for status, _, _ in answers} == {200}


def test_requests_beyond_the_bound_are_sent_away_in_form(
    site: Site, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_REQUESTS", 20)
    with many(site, 20) as connections:
        for one in connections:
            one.sendall(chat_request("step"))
            assert one.recv(4096).startswith(b"HTTP/1.1 200")
        status, body, response = site.chat("hello")
        assert (status, body["error"]["code"], body["error"]["type"]) == (503, "api.overloaded", "server_error")
        assert int(response.headers["retry-after"]) > 0
        assert AgentClient(site.socket).get("status") == {"device": "edge-1"}
    for _ in connections:
        worker.seen.release.release()
    assert any(site.chat("hello")[0] == 200 for _ in range(500))  # once the agent has seen them go


def test_headers_of_an_honest_size_pass(site: Site) -> None:
    assert site.call("GET", "/v1/models", x_long="a" * 60_000)[0] == 200


@pytest.mark.parametrize("text", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\0"])
def test_what_is_no_http(site: Site, text: bytes) -> None:
    with site.raw() as odd:
        odd.sendall(text)
        status, _, body = parse_answer(read_to_end(odd))
    assert (status, json.loads(body)["error"]["code"]) == (400, "malformed_request")


def test_pipelined_requests_are_answered_in_order(site: Site) -> None:
    with site.raw() as client:
        client.sendall(chat_request("first") + chat_request("second", close=True))
        text = read_to_end(client)
    assert 0 < text.index(b'"first"') < text.index(b'"second"')
    assert text.count(b"[DONE]") == 2


def test_a_client_that_goes_with_requests_in_line_stops_the_first(site: Site, worker: StandInWorker) -> None:
    with site.raw() as client:
        client.sendall(chat_request("step"))
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.sendall(LIST)
    assert worker.seen.client_gone.wait(DEADLINE_S)


@pytest.mark.parametrize("pieces", [1, 2, 200])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("behind", [b"", b"\0\0", LIST, chat_request("again")], ids=["", "noise", "list", "chat"])
def test_who_offers_http2_is_answered_in_http1(site: Site, pieces: int, chunked: bool, behind: bytes) -> None:
    """Java's client does so by default, with a body behind it. What comes behind that is not read."""
    request = chat_request("hello")
    head, _, body = request.partition(b"\r\n\r\n")
    head += b"\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__"
    if chunked:
        head = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    text = head + b"\r\n\r\n" + body + behind
    size = -(-len(text) // pieces)
    with site.raw() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(text), size):
            client.sendall(text[at : at + size])
        status, headers, answer = parse_answer(read_to_end(client))
    assert (status, headers["connection"]) == (200, "close")
    assert b'"hello"' in answer
    assert answer.count(b"[DONE]") == 1
    assert b"again" not in answer


def test_an_answer_reaches_a_client_that_is_still_sending(site: Site) -> None:
    """It comes before the body has; closed at once, the connection would be reset, and the answer lost with it."""
    with site.raw() as client:
        client.sendall(TOO_LARGE)
        assert client.recv(1, socket.MSG_PEEK)
        client.sendall(bytes(MAX_BODY_BYTES + 1))
        status, headers, answer = parse_answer(read_to_end(client))
    assert (status, headers["connection"]) == (413, "close")
    assert json.loads(answer)["error"]["code"] == "request_too_large"


def test_what_has_too_many_headers_is_told_so_while_it_sends_more(site: Site) -> None:
    with site.raw() as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\n" + b"x-long: a\r\n" * 100_000)
        status, _, answer = parse_answer(read_to_end(client))
    assert (status, json.loads(answer)["error"]["code"]) == (431, "headers_too_large")


def test_a_client_that_never_closes_is_left_after_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    with site.raw() as client:
        client.sendall(TOO_LARGE)
        assert parse_answer(read_to_end(client))[0] == 413
        with pytest.raises(ConnectionError):
            keep_sending(client)


def test_the_agents_end_waits_for_nobody_to_close(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with site.raw() as client:
        client.sendall(TOO_LARGE)
        assert parse_answer(read_to_end(client))[0] == 413
        with caplog.at_level("ERROR"):
            site.api.stop()
    assert caplog.messages == []  # uvicorn says there what it had to cut short


def test_who_is_sending_and_closes_with_the_answer_is_left_at_once(site: Site) -> None:
    with site.raw() as client:
        client.sendall(LAST)
        assert parse_answer(read_to_end(client))[0] == 200
        with pytest.raises(ConnectionError):
            keep_sending(client, connection.LINGER_S / 2)


def test_those_that_linger_make_room_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 2)
    with site.raw() as waits, site.raw() as lingers:
        waits.sendall(LIST)
        read_answer(waits)
        lingers.sendall(TOO_LARGE)
        read_to_end(lingers)
        with site.raw() as third:
            third.sendall(LAST)
            assert parse_answer(read_to_end(third))[0] == 200
            waits.sendall(LIST)
            assert read_answer(waits).startswith(b"HTTP/1.1 200")


def test_what_stands_behind_an_answer_is_no_body_of_the_request_before(site: Site) -> None:
    """Answered before its body has come, a request is the last one: its body would be taken for the next head."""
    connection = site.http()
    for _ in range(5):
        connection.request("POST", "/v1/unknown", b"x" * 1_000_000)
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        assert (answer.status, len(json.loads(answer.read())["data"])) == (200, 1)
    connection.close()


def test_asking_again_gives_no_more_time_to_who_reads_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "READER_S", 0.3)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", site.port))
        with pytest.raises(ConnectionError):
            ask_without_end(client)


def ask_without_end(client: socket.socket) -> None:
    """Ask for long answers and read none of them."""
    ends_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends_s:
        client.sendall(chat_request("x" * 100_000))
        time.sleep(0.05)


def test_many_that_come_at_once_do_not_all_take_the_place_of_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom one of them sends away is gone only after the others have looked for somebody to send away."""
    limit = 10
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", limit)
    with site.raw() as lingers:
        before = descriptors()  # with both ends of one
        lingers.sendall(TOO_LARGE)
        read_to_end(lingers)
        for _ in range(2):
            site.pause(0.3)
            with many(site, 3 * limit) as connections:
                last = connections[-1]
                last.sendall(LIST)
                assert read_answer(last).startswith(b"HTTP/1.1 200")  # so all have been seen
                assert descriptors() - before - len(connections) <= limit


def descriptors() -> int:
    """Return how many files and sockets this process, which is client and agent, has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("body", [b"\xff" * 100, b'{"model": "\xc3("}', b'{"a":' * 50_000, b"[" * 10_000, b"\0"])
def test_bodies_that_are_no_json(site: Site, body: bytes) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}"
    with site.raw() as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        status, _, answer = parse_answer(read_to_end(client))
    assert (status, json.loads(answer)["error"]["code"]) == (400, "api.bad_json")
