"""The TCP door for other machines: TLS and keys, and what comes before either."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from pathlib import Path

import openai
import pytest

from garrison_agent.api import connection
from tests.fakes.api_site import CAMERA_KEY, DEADLINE_S, Site, chat_request, read_to_end
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.pki import Authority
from tests.fakes.worker_server import StandInWorker
from tests.integration.api.conftest import Open
from tests.integration.runtimes.workers import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def context(folder: Path) -> ssl.SSLContext:
    """What a client trusts."""
    authority = Authority(folder, "ca")
    issued = authority.issue("127.0.0.1", server=True)
    issued.key.chmod(0o600)
    issued.cert.rename(folder / "cert.pem")
    issued.key.rename(folder / "key.pem")
    return ssl.create_default_context(cafile=str(authority.pem))


@pytest.fixture
def site(open_site: Open, worker: StandInWorker, folder: Path, context: ssl.SSLContext) -> Site:
    site = open_site(
        LocalOwner(make_route(socket=worker.path)),
        tcp_keys=True,
        tls=(folder / "cert.pem", folder / "key.pem"),
        names=("board.example",),
    )
    site.add()
    return site


def get(site: Site, context: ssl.SSLContext, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = site.http(context)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_who_says_goodbye_and_reads_nothing_keeps_no_connection(
    site: Site, worker: StandInWorker, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio takes it for closed then, and would wait for ever to send what is left below TLS."""
    monkeypatch.setattr(connection, "READER_S", 1.0)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer {CAMERA_KEY}\r\n".encode()
    request = head + chat_request("x" * 60_000, close=True).partition(b"\r\n")[2]
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(DEADLINE_S)
        plain.connect(("127.0.0.1", site.port))
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
            eventually(lambda: site.shrink_send_buffers() == 1, "the connection is open")
            client.sendall(request)
            eventually(lambda: worker.seen.requests != [], "it is answered")
            time.sleep(0.3)  # the answer goes as far as it can
            client.setblocking(False)
            with contextlib.suppress(ssl.SSLError):
                client.unwrap()
            assert site.shrink_send_buffers() == 1
            eventually(lambda: site.shrink_send_buffers() == 0, "the connection is cut off")


def test_it_is_called_by_its_name(open_site: Open, folder: Path, context: ssl.SSLContext) -> None:
    site = open_site(LocalOwner(), tls=(folder / "cert.pem", folder / "key.pem"), names=("board.example", "b"))
    assert site.api.endpoints[0].startswith("https://board.example:")


def test_a_chat_over_tls(site: Site, context: ssl.SSLContext, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    with openai.OpenAI(base_url=f"https://127.0.0.1:{site.port}/v1", api_key=CAMERA_KEY, max_retries=0) as client:
        stream = client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "over the wire"}], stream=True
        )
        assert [chunk.choices[0].delta.content for chunk in stream] == ["over", "the", "wire"]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="gsk_wrong").models.list()


def test_host_and_key_are_checked(site: Site, context: ssl.SSLContext) -> None:
    key = {"authorization": f"Bearer {CAMERA_KEY}"}
    assert get(site, context, "/v1/models", key)[0] == 200
    assert get(site, context, "/v1/models", {**key, "host": "board.example"})[0] == 200
    assert get(site, context, "/v1/models", {**key, "host": "evil.example"})[0] == 403
    assert get(site, context, "/v1/models", {})[0] == 401
    assert get(site, context, "/garrison/v1/status", key)[0] == 403


def test_plain_http_is_not_answered(site: Site) -> None:
    with site.raw() as plain:
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert b"HTTP/1.1" not in read_to_end(plain)


def test_a_client_that_goes_stops_the_worker(site: Site, context: ssl.SSLContext, worker: StandInWorker) -> None:
    raw = site.raw()
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as client:
        text = chat_request("step").replace(b"host: localhost", f"host: localhost\r\nx-api-key: {CAMERA_KEY}".encode())
        client.sendall(text)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    assert worker.seen.client_gone.wait(DEADLINE_S)


def test_a_reader_over_tls_that_takes_nothing_holds_little(
    site: Site, context: ssl.SSLContext, worker: StandInWorker
) -> None:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    raw.settimeout(DEADLINE_S)
    raw.connect(("127.0.0.1", site.port))
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as stuck:
        stuck.sendall(
            chat_request("flood").replace(b"host: localhost", f"host: localhost\r\nx-api-key: {CAMERA_KEY}".encode())
        )
        assert worker.seen.first_event_sent.wait(DEADLINE_S)
        last = -1
        while worker.seen.bytes_sent != last:
            last = worker.seen.bytes_sent
            worker.seen.client_gone.wait(0.25)
        assert last < 12 * 1024 * 1024
        status, body = get(site, context, "/v1/models", {"x-api-key": CAMERA_KEY})
        assert (status, len(json.loads(body)["data"])) == (200, 1)
    assert worker.seen.client_gone.wait(DEADLINE_S)
