"""The registry over HTTPS: ``Source`` spoken to the controller's ``/device/v1`` endpoints.

Who opens the requests is the caller's choice: the agent's signed session for blobs, or ``HttpsOpener`` for metadata
and targets, which are public. Source: docs/protocol.md, "Device requests".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from garrison_agent.https import TIMEOUT_S, Answer, send
from garrison_agent.pace import PATIENCE_S, Pace
from garrison_agent.tls import pinned_context
from garrison_protocol.errors import GarrisonError, NotFoundError, RefusedError, UnavailableError

PIECE_BYTES = 16 * 1024
"""What a TLS record holds: no read brings more."""


class HttpSource:
    """The controller's registry endpoints as a ``Source``. Safe in any thread if ``open_request`` is."""

    def __init__(self, open_request: Callable[[str, dict[str, str]], Answer]) -> None:
        """``open_request(path, headers)`` sends a GET and returns the answer; path begins with ``/device/v1/``."""
        self._open_request = open_request

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``Source.metadata``."""
        return self._whole(f"/device/v1/metadata/{quote(name, safe='')}", max_bytes)

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``Source.target``."""
        return self._whole(f"/device/v1/targets/{quote(sha256, safe='')}/{quote(path)}", max_bytes)

    def blob(self, sha256: str, offset: int) -> Generator[bytes, None, None]:
        """See ``Source.blob``. One streamed request; pieces are handed on as they come, so that none is lost."""
        path = f"/device/v1/blobs/{sha256}"
        response = self._open(path, {"Range": f"bytes={offset}-", "Accept-Encoding": "identity"})
        try:
            if response.status == 206:
                start = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
                if start != str(offset):
                    raise _unreachable(path, f"it answered another range than asked: starts at {start or 'nowhere'}")
            elif response.status != 200 or offset:  # a 200 would send again what is here already
                raise _refused(path, response.status)
            while piece := _read(response.read, PIECE_BYTES, path):
                yield piece
        finally:
            response.close()

    def _whole(self, path: str, max_bytes: int) -> bytes:
        response = self._open(path, {"Accept-Encoding": "identity"})
        try:
            if response.status != 200:
                raise _refused(path, response.status)
            data = bytearray()
            while piece := _read(response.read, min(PIECE_BYTES, max_bytes + 1 - len(data)), path):
                data += piece
                if len(data) > max_bytes:
                    raise RefusedError(
                        "source.too_long",
                        f"{path}: the controller sent more than the {max_bytes} bytes allowed",
                        hint="something other than a Garrison controller may be answering",
                    )
            announced = response.headers.get("Content-Length")
            if announced is not None and announced != str(len(data)):
                raise _unreachable(path, f"the connection ended after {len(data)} of {announced} bytes")
            return bytes(data)
        finally:
            response.close()

    def _open(self, path: str, headers: dict[str, str]) -> Answer:
        from http.client import HTTPException

        try:
            return self._open_request(path, headers)
        except UnavailableError as error:
            raise _unreachable(path, error.message) from error
        except (OSError, HTTPException) as error:
            raise _unreachable(path, str(error) or type(error).__name__) from error


def _read(read: Callable[[int], bytes], amount: int, path: str) -> bytes:
    from http.client import HTTPException

    try:
        return read(amount)
    except (OSError, HTTPException) as error:
        raise _unreachable(path, str(error) or type(error).__name__) from error


def _refused(path: str, status: int) -> GarrisonError:
    if status == 404:
        return NotFoundError("source.not_found", f"{path}: the controller has no such file")
    return _unreachable(path, f"it answered with status {status}")


def _unreachable(path: str, cause: str) -> UnavailableError:
    return UnavailableError(
        "source.unreachable",
        f"cannot get {path} from the controller: {cause}",
        hint="check the network and that the controller runs; the agent tries again by itself",
        retryable=True,
    )


class HttpsOpener:
    """Opens GET requests at ``url`` over TLS that trusts only the pinned CA; one connection a request, one at a time.

    All of them together keep one pace, with ``within_s`` as the time that ``Pace`` takes: whoever delays every one of
    many small answers a little gains nothing.
    ``floor`` is the earliest time it can be: the server's certificate is judged at the later of it and the clock, so
    that a board without a clock still gets through.
    """

    def __init__(
        self,
        url: str,
        ca_path: Path,
        *,
        bearer: Callable[[], str] | None = None,
        floor: datetime | None = None,
        timeout_s: float = TIMEOUT_S,
        within_s: float = PATIENCE_S,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._pace, self._now_s = Pace(within_s), now_s
        self._bearer = bearer
        self._timeout_s = timeout_s
        self._context = pinned_context(
            ca_path, lambda: datetime.now(UTC) if floor is None else max(floor, datetime.now(UTC))
        )

    def __call__(self, path: str, headers: Mapping[str, str]) -> Answer:
        """Return the answer to a GET of ``path``, whatever its status.

        Raises:
            OSError, http.client.HTTPException: the request failed.
        """
        extra = {} if self._bearer is None else {"Authorization": f"Bearer {self._bearer()}"}
        return send(
            self._url,
            self._context,
            "GET",
            path,
            headers={**headers, **extra},
            timeout_s=self._timeout_s,
            pace=self._pace,
            now_s=self._now_s,
        )
