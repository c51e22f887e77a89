"""A stand-in for a model worker: real HTTP on a real unix socket, answers decided by the last prompt.

Prompts it knows: ``flood`` (events without end), ``step`` (one event per ``release``), ``die`` (an event and a half,
then the connection breaks), ``die unheard`` (no byte of an answer), ``garble`` (no HTTP), ``reject`` (a 400), ``full``
(a 503), ``hang`` (no answer as long as the client stays). Anything else is echoed word by word; under ``/api`` as
Ollama would, in lines of JSON. ``python -m tests.fakes.worker_server SOCKET`` runs it as a process to be killed.
"""

from __future__ import annotations

import json
import select
import socket
import socketserver
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any


@dataclass
class Seen:
    """What the worker saw, for tests to wait on and look at."""

    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    first_event_sent: threading.Event = field(default_factory=threading.Event)
    client_gone: threading.Event = field(default_factory=threading.Event)
    release: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    bytes_sent: int = 0


class StandInWorker:
    """Serves on ``path`` in threads of this process; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = Seen()
        self._server = _Server(str(path), _Handler)
        self._server.seen = self.seen
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="stand-in-worker")

    def __enter__(self) -> StandInWorker:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening; the socket file stays, as after a killed worker."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    seen: Seen

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type] # typeshed knows IP sockets only


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._record(b"")
        self._json(200, {"name": self.path.split("/")[3], "platform": "stand-in", "inputs": [], "outputs": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self._record(body)
        if self.path.endswith("/infer"):
            self._json(200, {"model_name": self.path.split("/")[3], "outputs": [], "echo": json.loads(body)})
            return
        request = json.loads(body)
        prompt = request["messages"][-1]["content"] if "messages" in request else str(request.get("prompt", ""))
        if self.path.startswith("/api/"):
            self._ollama(request, prompt)
            return
        act = {
            "flood": self._flood,
            "step": self._step,
            "die": self._die,
            "die unheard": self._hang_up,
            "garble": self._garble,
            "reject": self._reject,
            "full": self._full,
            "hang": self._hang,
        }.get(prompt)
        if act is not None:
            act()
        elif request.get("stream"):
            self._stream(prompt.split())
        else:
            message = {"role": "assistant", "content": prompt}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            self._json(200, {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})

    def _record(self, body: bytes) -> None:
        self.server.seen.headers.append({key.lower(): value for key, value in self.headers.items()})
        self.server.seen.requests.append((self.command, self.path, body))

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, words: list[str]) -> None:
        self._start_events()
        for word in words:
            self._event(word)
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _ollama(self, request: dict[str, Any], prompt: str) -> None:
        """Answer as Ollama does: streamed as lines of JSON unless asked otherwise."""
        if prompt == "reject":
            self._json(400, {"error": "too long"})
            return
        frames = [self._ollama_frame(word, done=False) for word in prompt.split()]
        if request.get("stream") is False:
            self._json(200, self._ollama_frame(prompt, done=True))
            return
        self.send_response(200)
        self.send_header("content-type", "application/x-ndjson")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if prompt == "die":
            self._chunk(json.dumps(self._ollama_frame("half", done=False)).encode() + b'\n{"model": "m", "mess')
            self._hang_up()
            return
        for frame in [*frames, self._ollama_frame("", done=True)]:
            self._chunk(json.dumps(frame).encode() + b"\n")
        self.wfile.write(b"0\r\n\r\n")

    def _ollama_frame(self, text: str, *, done: bool) -> dict[str, Any]:
        content = (
            {"message": {"role": "assistant", "content": text}} if self.path == "/api/chat" else {"response": text}
        )
        end = {"done_reason": "stop", "eval_count": 1} if done else {}
        return {"model": "m", "created_at": "2025-01-01T00:00:00Z", **content, "done": done, **end}

    def _flood(self) -> None:
        self._start_events()
        text = "x" * 4000
        try:
            while True:
                self._event(text)
        except OSError:
            self.server.seen.client_gone.set()
            self.close_connection = True

    def _step(self) -> None:
        self._start_events()
        count = 0
        while not self._client_closed():
            if self.server.seen.release.acquire(timeout=0.02):
                count += 1
                self._event(f"token{count}")
        self.server.seen.client_gone.set()
        self.close_connection = True

    def _die(self) -> None:
        self._start_events()
        self._event("half")
        self._chunk(b'data: {"id": "c1", "choi')
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _garble(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")
        self._hang_up()

    def _reject(self) -> None:
        error = {"message": "too long", "type": "invalid_request_error", "param": "messages"}
        self._json(400, {"error": {**error, "code": "context_length_exceeded"}})

    def _full(self) -> None:
        error = {"message": "the queue is full", "type": "server_error", "param": None, "code": "queue_full"}
        self._json(503, {"error": error})

    def _hang(self) -> None:
        self.server.seen.first_event_sent.set()
        self.connection.recv(1)  # the agent closes when it has no more use for the answer
        self.server.seen.client_gone.set()
        self.close_connection = True

    def _start_events(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("set-cookie", "never=passed")
        self.end_headers()

    def _event(self, text: str) -> None:
        choice = {"index": 0, "finish_reason": None, "delta": {"content": text}}
        value = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.server.seen.first_event_sent.set()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.server.seen.bytes_sent += len(data)

    def _client_closed(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""


def main() -> None:
    """Serve until killed; prints a line when ready. ``step`` gets one token, so a kill finds it in mid-stream."""
    with StandInWorker(Path(sys.argv[1])) as worker:
        worker.seen.release.release()
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
