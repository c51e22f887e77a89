"""A stand-in for an OpenAI-compatible server: real TCP, and whatever answer a test decides, well-formed or not."""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Act = Callable[["Call"], None]


@dataclass
class Call:
    """One request, and the connection to answer it on."""

    connection: socket.socket
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    server: UpstreamStandIn

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        named = {"content-type": "application/json", "content-length": str(len(data))} | headers
        lines = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in named.items())
        self.send(f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode() + data)

    def begin_events(self) -> None:
        self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def event(self, text: str) -> None:
        choice = {"index": 0, "finish_reason": None, "delta": {"content": text}}
        value = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "theirs", "choices": [choice]}
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def wait_for_end(self) -> None:
        """Wait until the other side closes."""
        try:
            while self.connection.recv(4096):
                pass
        except OSError:
            pass
        self.server.client_gone.set()


def list_models(call: Call) -> None:
    call.answer({"object": "list", "data": [{"id": "theirs", "object": "model"}]})


def echo(call: Call) -> None:
    """Answer with the last message, or list the one model."""
    if call.method == "GET":
        list_models(call)
        return
    request = json.loads(call.body)
    text = request["messages"][-1]["content"]
    if request.get("stream"):
        call.begin_events()
        for word in text.split():
            call.event(word)
        if (request.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": len(text.split()), "total_tokens": 7 + len(text.split())}
            last = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "theirs", "choices": []}
            call.chunk(b"data: " + json.dumps({**last, "usage": usage}).encode() + b"\n\n")
        call.chunk(b"data: [DONE]\n\n")
        call.send(b"0\r\n\r\n")
        return
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 7, "completion_tokens": len(text.split()), "total_tokens": 7 + len(text.split())}
    head = {"id": "c1", "object": "chat.completion", "created": 1, "model": "theirs"}
    call.answer({**head, "choices": [choice], "usage": usage})


@dataclass
class UpstreamStandIn:
    """Serves on a port of loopback in threads of this process; a context manager. ``act`` answers every request."""

    act: Act = echo
    tls: ssl.SSLContext | None = None
    calls: list[Call] = field(default_factory=list)
    client_gone: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> UpstreamStandIn:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stand_in = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="upstream")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"

    @property
    def last(self) -> Any:
        """The JSON of the last request."""
        return json.loads(self.calls[-1].body)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    stand_in: UpstreamStandIn

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: the other side closes early in most of the tests."""


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def setup(self) -> None:
        if self.server.stand_in.tls is not None:
            self.request = self.server.stand_in.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()  # wrapped in TLS it is another than the one that the server closes

    def handle(self) -> None:
        line = self.rfile.readline().decode("latin-1")
        method, path, _ = line.split(" ", 2)
        headers: dict[str, str] = {}
        while (text := self.rfile.readline().decode("latin-1").strip()) != "":
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", "0")))
        stand_in = self.server.stand_in
        call = Call(self.request, method, path, headers, body, stand_in)
        stand_in.calls.append(call)
        stand_in.act(call)
