"""Calls to the controller's API, for the commands."""

from __future__ import annotations

import os
import ssl
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

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

TIMEOUT_S = 30.0
CHUNK_BYTES = 1024 * 1024
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

_BY_STATUS: dict[int, type[GarrisonError]] = {
    401: UnauthenticatedError,
    403: RefusedError,
    404: NotFoundError,
    409: ConflictError,
    422: InvalidError,
    503: UnavailableError,
    507: InsufficientError,
}


@dataclass(frozen=True, slots=True)
class Login:
    """Where the controller is and who calls. ``ca``: PEM file to trust instead of the system's authorities."""

    url: str
    token: str
    ca: Path | None


def login_path() -> Path:
    """Return the file that ``garrison access login`` writes."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "garrison" / "config.toml"


def read_login() -> Login:
    """Return the login from GARRISON_URL, GARRISON_TOKEN, GARRISON_CA, or else from the login file.

    Raises:
        UnauthenticatedError: ``login.missing``.
        InvalidError: ``login.malformed``.
    """
    path = login_path()
    stored: dict[str, Any] = {}
    if path.is_file():
        try:
            stored = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidError("login.malformed", f"{path} is damaged: {error}", hint="log in again") from error
    url = os.environ.get("GARRISON_URL") or stored.get("url")
    token = os.environ.get("GARRISON_TOKEN") or stored.get("token")
    ca = os.environ.get("GARRISON_CA") or stored.get("ca")
    if not url or not token:
        raise UnauthenticatedError(
            "login.missing",
            "no controller or no token is known",
            hint="run `garrison access login --url URL --ca FILE`, or set GARRISON_URL and GARRISON_TOKEN",
        )
    return Login(str(url).rstrip("/"), str(token), Path(ca) if ca else None)


class ApiClient:
    """One controller, seen by one principal; with an empty token, by a stranger.

    Every method raises the ``GarrisonError`` that the server answered.
    """

    def __init__(self, login: Login, transport: httpx.BaseTransport | None = None) -> None:
        self.url = _checked(login).url
        headers = {"Accept": "application/json"}
        if login.token:
            headers["Authorization"] = f"Bearer {login.token}"
        self._http = httpx.Client(
            base_url=login.url,
            headers=headers,
            timeout=TIMEOUT_S,
            verify=_trust(login.ca),
            transport=transport,
            trust_env=False,
        )

    @classmethod
    def from_environment(cls) -> ApiClient:
        """Return a client for the login in force (see ``read_login``)."""
        return cls(read_login())

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, params: dict[str, str | int] | None = None) -> Any:
        """Return the JSON answer of GET ``path``."""
        return self.request("GET", path, params=params)

    def post(self, path: str, json: object | None = None) -> Any:
        """Return the JSON answer of POST ``path``; None for an empty one."""
        return self.request("POST", path, json=json)

    def put(self, path: str, json: object | None = None) -> Any:
        """Return the JSON answer of PUT ``path``."""
        return self.request("PUT", path, json=json)

    def delete(self, path: str) -> Any:
        """Return the JSON answer of DELETE ``path``."""
        return self.request("DELETE", path)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str | int] | None = None,
        json: object | None = None,
        content: bytes | Iterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """Return the decoded JSON answer of one call; None for an empty one.

        Raises:
            GarrisonError: What the server answered, or ``controller.unreachable``.
        """
        try:
            response = self._http.request(
                method, path, params=params, json=json, content=content, headers=headers or {}
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise error_from(response.status_code, response.content)
        return response.json() if response.content else None

    def head(self, path: str) -> dict[str, str] | None:
        """Return the headers of HEAD ``path`` in lower case; None if there is no such thing."""
        try:
            response = self._http.head(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code == 404:
            return None
        if response.is_error:
            raise error_from(response.status_code, response.content)
        return {name.lower(): value for name, value in response.headers.items()}

    def fetch(self, path: str) -> bytes:
        """Return the raw bytes of GET ``path``."""
        try:
            response = self._http.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise error_from(response.status_code, response.content)
        return response.content

    def download(self, path: str, destination: Path, progress: Progress | None = None) -> None:
        """Write the body of GET ``path`` to ``destination``."""
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error:
                    raise error_from(response.status_code, response.read())
                total = int(response.headers.get("Content-Length", 0))
                done = 0
                with destination.open("wb") as file:
                    for chunk in response.iter_bytes(CHUNK_BYTES):
                        file.write(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress(done, total)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    @contextmanager
    def stream(self, path: str, params: dict[str, str | int] | None = None) -> Iterator[Iterator[bytes]]:
        """Give the body of GET ``path`` in pieces, as they come."""
        try:
            with self._http.stream("GET", path, params=params) as response:
                if response.is_error:
                    raise error_from(response.status_code, response.read())
                yield response.iter_bytes(CHUNK_BYTES)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def upload_file(
        self, path: str, file: Path, progress: Progress | None = None, *, offset: int = 0, method: str = "PUT"
    ) -> Any:
        """Send ``file`` from ``offset`` on, with a ``Content-Range`` naming the place; return the answer.

        The bytes are streamed, so a file may be larger than memory.
        """
        total = file.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(total - offset)}
        if total > offset:
            headers["Content-Range"] = f"bytes {offset}-{total - 1}/{total}"
        return self.request(method, path, content=_chunks(file, offset, total, progress), headers=headers)

    def _unreachable(self, error: httpx.HTTPError) -> UnavailableError:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return UnavailableError(
                "controller.unreachable",
                f"{self.url} shows a certificate that is not trusted here: {error}",
                hint="name the controller's authority with GARRISON_CA or `garrison access login --ca FILE`;"
                " FILE is pki/server-ca.pem in the controller's state folder",
            )
        return UnavailableError(
            "controller.unreachable",
            f"{self.url} does not answer: {error}",
            hint="check the URL (GARRISON_URL, `garrison access login`), and that `garrison serve run` runs there",
            retryable=True,
        )


def error_from(status: int, body: bytes) -> GarrisonError:
    """Return the error that an answer with ``status`` stands for."""
    kind = _BY_STATUS.get(status, GarrisonError)
    try:
        document = httpx.Response(status, content=body).json()
        code, message = str(document["code"]), str(document["message"])
        hint, retryable = str(document.get("hint", "")), bool(document.get("retryable", False))
        fields = {str(key): value for key, value in dict(document.get("fields", {})).items() if key not in _RESERVED}
    except (ValueError, KeyError, TypeError):
        if status == 403:  # such as to HEAD, whose answers have no body
            return DeniedError(
                "http.403", "your roles do not allow this", hint="ask a security-admin for one that does"
            )
        return kind(f"http.{status}", f"the controller answered with status {status}", hint="read its log")
    if status == 403 and code.startswith("access."):
        kind = DeniedError
    return kind(code, message, hint=hint, retryable=retryable, **fields)


_RESERVED = frozenset({"code", "message", "hint", "retryable"})


def _checked(login: Login) -> Login:
    """Return ``login`` if it can be sent at all.

    Raises:
        InvalidError: ``login.url_malformed`` or ``login.token_malformed``.
    """
    try:
        usable = urlsplit(login.url).scheme == "https" and bool(httpx.URL(login.url).host)
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise InvalidError("login.url_malformed", f"{login.url!r} is no https address", hint="write https://HOST:PORT")
    if not login.token.isascii() or not login.token.isprintable():
        raise InvalidError("login.token_malformed", "the API token has a line break or odd characters", hint="log in")
    return login


def _trust(ca: Path | None) -> ssl.SSLContext:
    if ca is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise InvalidError(
            "login.ca_unreadable",
            f"{ca} holds no certificate authority: {error}",
            hint="name the controller's authority: pki/server-ca.pem of its state folder",
        ) from error


def _chunks(file: Path, offset: int, total: int, progress: Progress | None) -> Iterator[bytes]:
    with file.open("rb") as source:
        source.seek(offset)
        done = offset
        while chunk := source.read(min(CHUNK_BYTES, total - done)):
            yield chunk
            done += len(chunk)
            if progress is not None:
                progress(done, total)
