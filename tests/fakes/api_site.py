"""A local API with its own owner, and raw sockets in front of it."""

from __future__ import annotations

import json
import socket
import ssl
import time
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from garrison_agent.api.server import LocalApi
from garrison_agent.core.applications import Application, ApplicationTable, key_digest
from tests.fakes.local_owner import LocalOwner

DEADLINE_S = 20.0
LIST = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
LAST = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
CAMERA_KEY, ADMIN_KEY = "gsk_" + "ca" * 32, "gsk_" + "ad" * 32


class Site:
    """One API; ``applications`` may be swapped while it runs."""

    def __init__(self, folder: Path, owner: LocalOwner, **settings: Any) -> None:
        self.folder, self.owner = folder, owner
        self.applications = ApplicationTable()
        given: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "tcp_open": True, **settings}
        self.socket = folder / "agent.sock"
        self.api = LocalApi(
            socket=self.socket,
            table=owner.read,
            command=owner.post,
            applications=lambda: self.applications,
            **given,
        )
        self.api.start()

    def add(self, name: str = "camera", key: str = CAMERA_KEY, **limits: Any) -> None:
        self.applications = self.applications.added(Application(name, key_digest(key), 0, **limits))

    @property
    def port(self) -> int:
        port = urlsplit(self.api.endpoints[0]).port
        assert port is not None
        return port

    def http(self, context: ssl.SSLContext | None = None) -> HTTPConnection:
        if context is None:
            return HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        return HTTPSConnection("127.0.0.1", self.port, timeout=DEADLINE_S, context=context)

    def call(
        self, method: str, path: str, body: Any = None, *, key: str = "", **headers: str
    ) -> tuple[int, Any, HTTPResponse]:
        connection = self.http()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            sent["authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body).encode(), sent)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text[:1] in b"{[" else text, response
        finally:
            connection.close()

    def chat(
        self, prompt: str = "hello", *, model: str = "chat", key: str = "", **headers: str
    ) -> tuple[int, Any, HTTPResponse]:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        return self.call("POST", "/v1/chat/completions", body, key=key, **headers)

    def pause(self, seconds: float) -> None:
        """Keep the API's event loop from doing anything for a while."""
        assert self.api._loop is not None
        self.api._loop.call_soon_threadsafe(time.sleep, seconds)

    def shrink_send_buffers(self) -> int:
        """Let the kernel hold little of what the open connections write; return how many there are."""
        connections = [one for server in self.api._servers for one in server.server_state.connections]
        for one in connections:
            one.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return len(connections)

    def raw(self, *, unix: bool = False) -> socket.socket:
        """Return an open connection, for what a client library would never send."""
        if unix:
            connection = socket.socket(socket.AF_UNIX)
            address: Any = str(self.socket)
        else:
            connection = socket.socket()
            address = ("127.0.0.1", self.port)
        connection.settimeout(DEADLINE_S)
        connection.connect(address)
        return connection


def chat_request(prompt: str, *, close: bool = False) -> bytes:
    """Return a whole request for a streamed chat."""
    body = json.dumps({"model": "chat", "stream": True, "messages": [{"role": "user", "content": prompt}]}).encode()
    end = "connection: close\r\n" if close else ""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{end}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_to_end(connection: socket.socket) -> bytes:
    """Return everything until the other side closes; a reset ends it, too."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def read_answer(connection: socket.socket) -> bytes:
    """Return one answer, whose length its header says."""
    text = b""
    while (end := text.find(b"\r\n\r\n")) < 0:
        text += _some(connection)
    length = int(text[:end].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(text) < end + 4 + length:
        text += _some(connection)
    return text


def _some(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise ConnectionError("it ended in the middle of an answer")
    return part


def parse_answer(text: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers, and body of the first answer in ``text``."""
    head, _, body = text.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body
