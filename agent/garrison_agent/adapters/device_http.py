"""Requests of an enrolled board to its controller: server-only TLS, signed by the identity key over a nonce.

A signed nonce buys a bearer token, kept until the controller refuses it (docs/protocol.md, "Device requests").
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from garrison_agent.https import TIMEOUT_S, Answer, send
from garrison_agent.identity import Identity
from garrison_protocol.errors import (
    ConflictError,
    GarrisonError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnauthenticatedError,
    UnavailableError,
)
from garrison_protocol.messages.enrolment import NonceResponse, SessionRequest, SessionResponse, session_bytes

MAX_ANSWER_BYTES = 1024 * 1024
MAX_ERROR_CHARS = 500

M = TypeVar("M", bound=BaseModel)

_BY_STATUS: dict[int, type[GarrisonError]] = {
    401: UnauthenticatedError,
    403: RefusedError,
    404: NotFoundError,
    409: ConflictError,
}


def request(
    url: str,
    context: ssl.SSLContext,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Return the answer, whatever its status; the caller closes it.

    Raises:
        UnavailableError: ``controller.unreachable``.
    """
    from http.client import HTTPException

    try:
        return send(url, context, method, path, headers=headers or {}, body=body, timeout_s=timeout_s)
    except (OSError, HTTPException) as error:
        raise UnavailableError(
            "controller.unreachable",
            f"cannot reach the controller at {url}: {error or type(error).__name__}",
            hint="check the network, the address, and that the controller runs",
            retryable=True,
        ) from error


def exchange(url: str, context: ssl.SSLContext, path: str, answer: type[M], body: BaseModel | None = None) -> M:
    """Return what the controller answered to a GET, or with ``body`` to a POST, of JSON.

    Raises:
        UnavailableError: ``controller.unreachable``.
        GarrisonError: What the controller says is wrong, by its own code; ``controller.bad_answer``.
    """
    return parsed(answer, call(url, context, path, body)[1], url + path)


def call(url: str, context: ssl.SSLContext, path: str, body: BaseModel | None = None) -> tuple[int, bytes]:
    """Return status (below 400) and text of the answer to a GET, or with ``body`` to a POST, of JSON.

    Raises:
        UnavailableError: ``controller.unreachable``.
        GarrisonError: What the controller says is wrong, by its own code; ``controller.bad_answer``.
    """
    method, data, headers = "GET", None, {"Accept": "application/json"}
    if body is not None:
        method, data = "POST", body.model_dump_json().encode()
        headers["Content-Type"] = "application/json"
    with request(url, context, method, path, headers=headers, body=data) as response:
        text = read_whole(response, url)
        if response.status >= 400:
            raise refusal(response.status, text, path)
        return response.status, text


def parsed(answer: type[M], text: bytes, where: str) -> M:
    """Return an answer's JSON, checked.

    Raises:
        GarrisonError: ``controller.bad_answer``.
    """
    try:
        return answer.model_validate_json(text)
    except ValidationError as error:
        raise _bad_answer(f"{where} answered with something else than expected") from error


def read_whole(response: Answer, url: str) -> bytes:
    """Return a small body.

    Raises:
        UnavailableError: ``controller.unreachable``; the connection broke.
        GarrisonError: ``controller.bad_answer``; it is larger than ``MAX_ANSWER_BYTES``.
    """
    from http.client import HTTPException

    data = bytearray()
    try:
        while len(data) <= MAX_ANSWER_BYTES and (piece := response.read(MAX_ANSWER_BYTES + 1 - len(data))):
            data += piece
    except (OSError, HTTPException) as error:
        raise UnavailableError(
            "controller.unreachable", f"the connection to {url} broke: {error}", retryable=True
        ) from error
    if len(data) > MAX_ANSWER_BYTES:
        raise _bad_answer(f"{url} answered with more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def refusal(status: int, text: bytes, path: str) -> GarrisonError:
    """Return the error that the controller describes in JSON, or one by its status alone."""
    kind = _BY_STATUS.get(status, UnavailableError if status >= 500 or status == 429 else InvalidError)
    try:
        error = json.loads(text)
        return kind(
            _plain(error["code"]),
            _plain(error["message"]),
            hint=_plain(error.get("hint", "")),
            retryable=bool(error.get("retryable", False)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return kind("controller.refused", f"{path} was answered with status {status}", retryable=status >= 500)


class DeviceHttp:
    """The controller's ``/device/v1`` endpoints as this board; safe in any thread."""

    def __init__(self, identity: Identity, context: Callable[[], ssl.SSLContext]) -> None:
        """``context`` gives TLS settings for each request."""
        self._identity = identity
        self._context = context
        self._lock = threading.Lock()
        self._token: str | None = None

    def open(self, path: str, headers: dict[str, str]) -> Answer:
        """Return the answer to a GET of ``path``, opening or renewing the session where the controller asks for it.

        Raises:
            UnavailableError: ``controller.unreachable``.
            GarrisonError: The controller refuses a session to this board, by its own code.
        """
        token = self._token
        response = self._get(path, headers, token)
        if response.status != 401:
            return response
        response.close()
        return self._get(path, headers, self._renew(token))

    def anchor(self, nonce: str) -> bytes:
        """Return the controller's anchor for ``nonce``, an envelope that nobody has opened yet.

        Raises:
            UnavailableError: ``controller.unreachable``.
            GarrisonError: What the controller says is wrong, by its own code.
        """
        path = f"/device/v1/anchor?device={self._identity.device}&nonce={nonce}"
        with self._get(path, {}, None) as response:
            data = read_whole(response, self._identity.url)
        if response.status >= 400:
            raise refusal(response.status, data, path)
        return data

    def _get(self, path: str, headers: dict[str, str], token: str | None) -> Answer:
        extra = {} if token is None else {"Authorization": f"Bearer {token}"}
        return request(self._identity.url, self._context(), "GET", path, headers={**headers, **extra})

    def _renew(self, refused: str | None) -> str:
        """Return a new token, or the one that another thread got meanwhile."""
        with self._lock:
            if self._token is not None and self._token != refused:
                return self._token
            url, context, device = self._identity.url, self._context(), self._identity.device
            nonce = exchange(url, context, "/device/v1/nonce", NonceResponse).nonce
            proof = self._identity.signing_key.sign(session_bytes(device, nonce)).hex()
            asked = SessionRequest(device=device, nonce=nonce, proof=proof)
            self._token = exchange(url, context, "/device/v1/session", SessionResponse, asked).token
            return self._token


def _plain(value: object) -> str:
    """Return text from outside so that it fits into an audit entry and can be encoded."""
    return str(value)[:MAX_ERROR_CHARS].encode(errors="replace").decode()


def _bad_answer(message: str) -> GarrisonError:
    return GarrisonError(
        "controller.bad_answer", message, hint="check that this is a Garrison controller of a matching version"
    )
