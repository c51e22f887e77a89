"""Attacks on the local API by programs of the board, and by machines of its network where it is open to them."""

from __future__ import annotations

import json
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.api import asgi, connection, tls_server
from garrison_agent.config import load_config
from garrison_protocol.errors import InvalidError
from tests.fakes.api_site import (
    ADMIN_KEY,
    CAMERA_KEY,
    DEADLINE_S,
    LAST,
    LIST,
    Site,
    chat_request,
    parse_answer,
    read_answer,
    read_to_end,
)
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.pki import Authority
from tests.fakes.worker_server import StandInWorker

pytestmark = pytest.mark.integration

Open = Callable[..., Site]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="garrison-") as name:
        yield Path(name)


@pytest.fixture
def worker(folder: Path) -> Iterator[StandInWorker]:
    with StandInWorker(folder / "1.sock") as running:
        yield running


@pytest.fixture
def open_site(folder: Path, worker: StandInWorker) -> Iterator[Open]:
    """Open an API before two models, for an application that may use one of them."""
    running: list[Site] = []

    def start(**settings: Any) -> Site:
        owner = LocalOwner(make_route(socket=worker.path), make_route("secret", socket=worker.path, name="secret"))
        running.append(Site(folder, owner, **settings))
        running[-1].add(models=frozenset({"chat"}))
        return running[-1]

    yield start
    for site in running:
        site.api.stop()


@pytest.fixture
def site(open_site: Open) -> Site:
    return open_site()


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["gsk_" + "0" * 64, CAMERA_KEY[:-1], CAMERA_KEY + "0", CAMERA_KEY.replace("c", "C")])
@pytest.mark.parametrize("needs_key", [True, False])
def test_a_guessed_key(open_site: Open, worker: StandInWorker, wrong: str, needs_key: bool) -> None:
    """A key that was guessed, cut off, or changed, also where none is needed."""
    site = open_site(tcp_keys=needs_key)
    assert site.chat(key=wrong)[0] == 401
    assert site.chat(x_api_key=wrong)[0] == 401
    assert worker.seen.requests == []


def test_the_key_of_a_removed_application(site: Site, worker: StandInWorker) -> None:
    """A key that was stolen, and whose application was removed since; a connection that stood already."""
    connection = site.http()
    connection.request("GET", "/v1/models", headers={"x-api-key": CAMERA_KEY})
    response = connection.getresponse()
    assert (response.status, len(json.loads(response.read())["data"])) == (200, 1)
    site.applications = site.applications.removed("camera")
    connection.request("GET", "/v1/models", headers={"x-api-key": CAMERA_KEY})
    assert connection.getresponse().status == 401
    connection.close()


def test_an_application_that_wants_more_models(site: Site, worker: StandInWorker) -> None:
    """An application asks for a model that it was not given, by every name and on every surface."""
    for name in ("secret", "secret:1.0.0"):
        assert site.chat(model=name, key=CAMERA_KEY)[0] == 403
        assert site.call("POST", f"/v2/models/{name}/infer", {}, key=CAMERA_KEY)[0] == 403
        assert site.call("GET", f"/v1/models/{name}", key=CAMERA_KEY)[0] == 403
        message = {"model": name, "messages": [{"role": "user", "content": "hello"}]}
        assert site.call("POST", "/api/chat", message, key=CAMERA_KEY)[0] == 403
    assert worker.seen.requests == []
    for path in ("/v1/models", "/api/tags", "/models/loaded", "/foundry/list", "/openai/models"):
        assert "secret" not in str(site.call("GET", path, key=CAMERA_KEY)[1]), path
        assert "secret" in str(site.call("GET", path)[1]), path


def test_an_application_that_manages(open_site: Open) -> None:
    """An application with a key for models loads, unloads, or removes them, or makes itself another key."""
    site = open_site(tcp_keys=True)
    for method, path in (
        ("POST", "/garrison/v1/models/chat/unload"),
        ("DELETE", "/garrison/v1/cache/smollm2"),
        ("POST", "/garrison/v1/apps"),
        ("GET", "/garrison/v1/apps"),
        ("GET", "/garrison/v1/status"),
        ("GET", "/models/unload/chat"),
        ("GET", "/openai/unload/chat"),
    ):
        assert site.call(method, path, {"name": "x", "admin": True}, key=CAMERA_KEY)[0] == 403, path
    assert site.owner.commands == []


def test_an_application_in_anothers_name(site: Site, worker: StandInWorker) -> None:
    """An application says that it is another one, so that the other's limits and turns are used up."""
    assert site.chat(key=CAMERA_KEY, x_garrison_app="console")[0] == 200
    assert site.chat(x_garrison_app="camera")[0] == 200
    assert [headers["x-garrison-app"] for headers in worker.seen.headers] == ["camera", "local"]


def test_a_web_page_with_a_key(open_site: Open) -> None:
    """A web page of elsewhere that got hold of an admin key, in a browser of the board."""
    site = open_site(tcp_keys=True)
    site.add("console", ADMIN_KEY, admin=True)
    for header, value in (("host", "evil.example"), ("origin", "https://evil.example")):
        status, answer, _ = site.call("POST", "/garrison/v1/models/chat/unload", key=ADMIN_KEY, **{header: value})
        assert (status, answer["code"]) == (403, f"api.{header}_refused")
    assert site.owner.commands == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
@pytest.mark.parametrize("tcp", ["open", "keys"])
def test_an_api_left_open_to_the_network(folder: Path, host: str, tcp: str) -> None:
    """Exposure: the API is set onto the network without TLS, or without keys, as 175,000 Ollama servers are."""
    path = folder / "agent.toml"
    path.write_text(f'[api]\nhost = "{host}"\ntcp = "{tcp}"\n')
    with pytest.raises(InvalidError, match="is reachable by other machines; that needs"):
        load_config(path)


# --- exhaustion ------------------------------------------------------------------------------------------------------


def test_headers_that_never_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowloris: connections that send nothing, blank lines, or the beginning of headers, and stay."""
    monkeypatch.setattr(connection, "HEADER_S", 0.2)
    for begin in (b"", b"\r\n\r\n", b"GET /v1/models HTTP/1.1\r\nhost: local"):
        with site.raw() as slow:
            slow.sendall(begin)
            assert read_to_end(slow) == b""
    for rest in (b"\r\n", b"GET /v1"):
        with site.raw() as slow:
            slow.sendall(LIST)
            assert read_answer(slow).startswith(b"HTTP/1.1 200")
            slow.sendall(rest)
            assert read_to_end(slow) == b""


def test_a_body_that_dribbles(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is announced, and comes byte by byte."""
    monkeypatch.setattr(asgi, "BODY_GRACE_S", 0.2)
    with site.raw() as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        status, headers, body = parse_answer(read_to_end(slow))
    assert (status, json.loads(body)["error"]["code"], headers["connection"]) == (408, "api.body_too_slow", "close")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n" + b"a: b\r\n" * 40_000 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-endless: " + b"a" * 400_000,
    ],
    ids=["one", "many", "address", "endless"],
)
def test_headers_larger_than_memory(site: Site, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, or an address, without a bound: the HTTP parser itself has none."""
    monkeypatch.setattr(connection, "HEADER_S", 10 * DEADLINE_S)
    with site.raw() as greedy:
        with suppress(ConnectionError):  # it may be cut off in the middle
            greedy.sendall(head)
        text = read_to_end(greedy)
    if text:  # a reset may overtake the answer
        status, headers, body = parse_answer(text)
        assert (status, json.loads(body)["error"]["code"], headers["connection"]) == (431, "headers_too_large", "close")
    assert site.call("GET", "/v1/models")[0] == 200


def test_requests_in_line_without_end(site: Site, worker: StandInWorker) -> None:
    """Pipelining: behind a request that takes long come more, without end, on the same connection."""
    with site.raw() as client:
        client.sendall(chat_request("step"))
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.sendall(LIST * 100)
        read_to_end(client)
    assert worker.seen.client_gone.wait(DEADLINE_S)


def test_a_reader_that_takes_nothing(site: Site, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client asks for a long answer, reads none of it, and stays: its place, and its model's, would be lost."""
    monkeypatch.setattr(connection, "READER_S", 0.3)
    with site.raw() as stuck:
        stuck.sendall(chat_request("flood"))
        assert worker.seen.client_gone.wait(DEADLINE_S)  # though the client is still there
        assert site.chat("hello")[0] == 200


def test_connections_that_do_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes every connection that the API has, asks now and then, and leaves none to others."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 4)
    with ExitStack() as stack:
        idle = [stack.enter_context(site.raw()) for _ in range(4)]
        for one in idle:
            one.sendall(LIST)
            assert read_answer(one).startswith(b"HTTP/1.1 200")
        assert site.call("GET", "/v1/models")[0] == 200
        assert read_to_end(idle[0]) == b""  # the one that has been idle for longest gave way
        idle[3].sendall(LAST)
        assert parse_answer(read_to_end(idle[3]))[0] == 200


def on_the_network(open_site: Open, folder: Path) -> tuple[Site, ssl.SSLContext]:
    authority = Authority(folder, "ca")
    issued = authority.issue("127.0.0.1", server=True)
    issued.key.chmod(0o600)
    site = open_site(tcp_keys=True, tls=(issued.cert, issued.key))
    return site, ssl.create_default_context(cafile=str(authority.pem))


def test_handshakes_that_never_begin(open_site: Open, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of the network opens connections without end, and never begins to speak TLS."""
    monkeypatch.setattr(tls_server, "MAX_HANDSHAKES", 4)
    monkeypatch.setattr(tls_server, "HANDSHAKE_S", 10 * DEADLINE_S)
    site, context = on_the_network(open_site, folder)
    silent = [site.raw() for _ in range(8)]
    honest = site.http(context)
    honest.request("GET", "/v1/models", headers={"x-api-key": CAMERA_KEY})
    assert honest.getresponse().status == 200
    honest.close()
    assert read_to_end(silent[0]) == b""
    for one in silent:
        one.close()


def test_a_handshake_that_never_ends(open_site: Open, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of the network begins to speak TLS, and stays silent."""
    monkeypatch.setattr(tls_server, "HANDSHAKE_S", 0.2)
    site, _ = on_the_network(open_site, folder)
    with site.raw() as silent:
        silent.sendall(b"\x16\x03\x01")
        assert read_to_end(silent) == b""
