"""The running agent's local API, over its unix socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket as sockets
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from garrison_protocol.errors import (
    ConflictError,
    DeniedError,
    GarrisonError,
    InsufficientError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnauthenticatedError,
    UnavailableError,
)

_TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 150.0
"""Above the agent's own bound for loading a model."""

_BY_STATUS: dict[int, type[GarrisonError]] = {
    400: InvalidError,
    401: UnauthenticatedError,
    404: NotFoundError,
    405: InvalidError,
    409: ConflictError,
    413: InvalidError,
    422: InvalidError,
    429: UnavailableError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
    507: InsufficientError,
}
_OPENAI_CODES = {"model_not_found": "model.unknown", "request_too_large": "api.body_too_large"}


class AgentClient:
    """Calls the agent that listens on ``socket``; every method returns parsed JSON.

    Raises (every method):
        UnavailableError: ``agent.not_running``, ``agent.busy``, ``agent.connection_lost``.
        DeniedError: ``agent.socket_denied``.
        GarrisonError: What the agent answered, as the class that its HTTP status stands for.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def get(self, *path: str) -> Any:
        """Return ``GET /garrison/v1/<path>``; segments are quoted."""
        return self._call("GET", _place(path), _TIMEOUT_S)

    def post(self, *path: str, body: object = None) -> Any:
        """Return ``POST /garrison/v1/<path>``, with ``body`` as JSON if there is one."""
        return self._call("POST", _place(path), LOAD_TIMEOUT_S, None if body is None else json.dumps(body).encode())

    def send(self, body: bytes, headers: dict[str, str], *path: str) -> Any:
        """Return ``POST /garrison/v1/<path>`` with a body of bytes."""
        return self._call("POST", _place(path), LOAD_TIMEOUT_S, body, headers)

    def delete(self, *path: str) -> Any:
        """Return ``DELETE /garrison/v1/<path>``."""
        return self._call("DELETE", _place(path), _TIMEOUT_S)

    def infer(self, place: str, body: object) -> Any:
        """Return ``POST <place>`` of an inference surface; waits for as long as the model takes."""
        return self._call("POST", place, None, json.dumps(body).encode())

    def stream(self, place: str, body: object) -> Generator[dict[str, Any], None, None]:
        """Yield the objects of a stream of server-sent events. Closing the generator stops the model.

        Raises:
            GarrisonError: Also what the stream ended with in its middle.
        """
        connection = _UnixConnection(self._socket, None)
        try:
            with self._translated(None):
                connection.request("POST", place, json.dumps(body).encode(), _JSON)
                response = connection.getresponse()
                if response.status >= 400:
                    _parse(response.status, response.read())
            while True:
                with self._translated(None):
                    line = response.readline()
                if not line:
                    raise _lost()
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise _failure(503, event)
                yield event
        finally:
            connection.close()

    def keep(self) -> KeptConnection:
        """Return a connection for many requests in a row, for one thread."""
        return KeptConnection(self._socket)

    def _call(
        self,
        method: str,
        place: str,
        timeout_s: float | None,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        connection = _UnixConnection(self._socket, timeout_s)
        try:
            with self._translated(timeout_s):
                connection.request(method, place, body, headers or (_JSON if body else {}))
                response = connection.getresponse()
                answer = response.read()
        finally:
            connection.close()
        return _parse(response.status, answer)

    @contextlib.contextmanager
    def _translated(self, timeout_s: float | None) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise UnavailableError(
                "agent.not_running",
                f"the agent is not running at {self._socket}",
                hint="start it with: systemctl start garrison-agent (or garrison-agent run); "
                "if it uses another configuration, name it with --config",
                socket=str(self._socket),
            ) from error
        except PermissionError as error:
            raise DeniedError(
                "agent.socket_denied",
                f"you may not connect to {self._socket}",
                hint="run the command with sudo, or join the group that owns the socket",
                socket=str(self._socket),
            ) from error
        except TimeoutError as error:
            raise UnavailableError(
                "agent.busy",
                f"the agent did not answer within {timeout_s or 0:.0f} s",
                hint="retry; its log shows what it does: garrison-agent logs",
                retryable=True,
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _lost() from error


class KeptConnection:
    """One connection to the agent, kept between requests; a context manager."""

    def __init__(self, socket: Path) -> None:
        self._connection = _UnixConnection(socket, None)

    def __enter__(self) -> KeptConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def infer(self, place: str, body: bytes) -> None:
        """Send a request in JSON and read its answer to the end.

        Raises:
            UnavailableError: ``agent.connection_lost``.
            GarrisonError: What the agent answered.
        """
        try:
            self._connection.request("POST", place, body, _JSON)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _lost() from error
        if response.status >= 400:
            _parse(response.status, answer)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))


_JSON = {"Content-Type": "application/json"}


def _place(path: tuple[str, ...]) -> str:
    return "/garrison/v1/" + "/".join(quote(part, safe=":") for part in path)


def _lost() -> UnavailableError:
    return UnavailableError(
        "agent.connection_lost",
        "the agent closed the connection before it had answered",
        hint="see why it ended: garrison-agent logs",
        retryable=True,
    )


def _parse(status: int, body: bytes) -> Any:
    try:
        value = json.loads(body)
    except ValueError as error:
        text = body[:200].decode("utf-8", "replace")
        raise UnavailableError(
            "agent.connection_lost",
            f"the agent answered {status}: {text}",
            hint="see its log: garrison-agent logs",
        ) from error
    if status < 400:
        return value
    raise _failure(status, value)


def _failure(status: int, value: dict[str, Any]) -> GarrisonError:
    """Return the error in an answer of any surface: Garrison's own, OpenAI's, or the Open Inference Protocol's."""
    kind = _BY_STATUS.get(status, GarrisonError)
    error = value.get("error")
    if isinstance(error, str):
        code, _, message = error.partition(": ")
        return kind(code, message) if message else kind("inference.failed", error)
    if isinstance(error, dict):
        code = str(error.get("code") or "failed")
        code = _OPENAI_CODES.get(code, code if "." in code else f"inference.{code}")
        if status == 403:
            kind = DeniedError
        return kind(code, str(error.get("message")), retryable=status in (429, 503))
    code = str(value["code"])
    if status == 403:
        kind = DeniedError if code.startswith("api.") else RefusedError
    return kind(
        code, str(value["message"]), hint=str(value["hint"]), retryable=bool(value["retryable"]), **value["fields"]
    )
