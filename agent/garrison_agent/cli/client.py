"""The running agent's management API, over its unix socket."""

from __future__ import annotations

import http.client
import json
import socket as sockets
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
    UnavailableError,
)

_TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 150.0
"""Above the agent's own bound for loading a model."""

_BY_STATUS: dict[int, type[GarrisonError]] = {
    400: InvalidError,
    404: NotFoundError,
    405: InvalidError,
    409: ConflictError,
    413: InvalidError,
    422: InvalidError,
    503: UnavailableError,
    507: InsufficientError,
}


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
        return self._call("GET", path, _TIMEOUT_S)

    def post(self, *path: str) -> Any:
        """Return ``POST /garrison/v1/<path>``."""
        return self._call("POST", path, LOAD_TIMEOUT_S)

    def send(self, body: bytes, headers: dict[str, str], *path: str) -> Any:
        """Return ``POST /garrison/v1/<path>`` with a body of bytes."""
        return self._call("POST", path, LOAD_TIMEOUT_S, body, headers)

    def delete(self, *path: str) -> Any:
        """Return ``DELETE /garrison/v1/<path>``."""
        return self._call("DELETE", path, _TIMEOUT_S)

    def _call(
        self,
        method: str,
        path: tuple[str, ...],
        timeout_s: float,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        connection = _UnixConnection(self._socket, timeout_s)
        try:
            place = "/garrison/v1/" + "/".join(quote(part, safe=":") for part in path)
            connection.request(method, place, body, headers or {})
            response = connection.getresponse()
            answer = response.read()
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
                f"the agent did not answer within {timeout_s:.0f} s",
                hint="retry; its log shows what it does: journalctl -u garrison-agent",
                retryable=True,
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                "agent.connection_lost",
                "the agent closed the connection before it had answered",
                hint="see why it ended: journalctl -u garrison-agent",
                retryable=True,
            ) from error
        finally:
            connection.close()
        return _parse(response.status, answer)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))


def _parse(status: int, body: bytes) -> Any:
    try:
        value = json.loads(body)
    except ValueError as error:
        text = body[:200].decode("utf-8", "replace")
        raise UnavailableError(
            "agent.connection_lost",
            f"the agent answered {status}: {text}",
            hint="see its log: journalctl -u garrison-agent",
        ) from error
    if status < 400:
        return value
    code = str(value["code"])
    kind = _BY_STATUS.get(status, GarrisonError)
    if status == 403:
        kind = DeniedError if code.startswith("api.") else RefusedError
    raise kind(
        code, str(value["message"]), hint=str(value["hint"]), retryable=bool(value["retryable"]), **value["fields"]
    )
