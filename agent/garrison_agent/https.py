"""Requests over HTTPS whose answers are read as they come, and given up where they only dribble.

The pace is kept below ``http.client``, at the socket: there it holds for status lines, headers, and bodies alike,
however they are read. ``http.client`` is imported where it is needed: an idle board does without it.
"""

from __future__ import annotations

import io
import ssl
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from garrison_agent.pace import Pace

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPMessage, HTTPResponse

TIMEOUT_S = 30.0
"""For a connection, a handshake, and each single read; for all that an answer takes there is its pace."""


class Answer:
    """An answer whose body is read in pieces; closing it ends its connection.

    Reading raises ``OSError`` or ``http.client.HTTPException`` where the connection fails or is too slow.
    """

    def __init__(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self._left = response.length
        self.status: int = response.status
        self.headers: HTTPMessage = response.headers

    def read(self, amount: int) -> bytes:
        """Return up to ``amount`` bytes as soon as some have come, or b"" at the end of the body."""
        if self._left is None:
            return self._response.read1(amount)
        piece = self._response.read1(min(amount, self._left))
        self._left -= len(piece)
        return piece

    def close(self) -> None:
        """End the connection, read or not."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def send(
    url: str,
    context: ssl.SSLContext,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    body: bytes | None = None,
    timeout_s: float = TIMEOUT_S,
    pace: Pace | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> Answer:
    """Send a request to the server at ``url``, on a connection of its own; return the answer, whatever its status.

    Requests that share a ``pace`` may take no longer together than one.

    Raises:
        OSError, http.client.HTTPException: No answer came, or none in time.
    """
    from http.client import HTTPResponse, HTTPSConnection

    kept = pace or Pace()

    def answered(*given: Any, **named: Any) -> HTTPResponse:
        response = HTTPResponse(*given, **named)
        raw = response.fp.detach()
        response.fp = io.BufferedReader(_Paced(raw, kept, now_s))
        return response

    parts = urlsplit(url)
    connection = HTTPSConnection(parts.hostname or "", parts.port or 443, context=context, timeout=timeout_s)
    connection.response_class = answered  # type: ignore[assignment] # called like the class
    try:
        began_s = now_s()
        connection.request(method, path, body=body, headers={**headers, "Connection": "close"})
        _require(kept.add(now_s() - began_s, 0), kept)
        return Answer(connection, connection.getresponse())
    except BaseException:
        connection.close()
        raise


class _Paced(io.RawIOBase):
    """What comes from a socket, as long as it keeps its pace."""

    def __init__(self, raw: io.RawIOBase, pace: Pace, now_s: Callable[[], float]) -> None:
        self._raw, self._pace, self._now_s = raw, pace, now_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began_s = self._now_s()
        count = self._raw.readinto(buffer) or 0
        _require(self._pace.add(self._now_s() - began_s, count) or count == 0, self._pace)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _require(in_time: bool, pace: Pace) -> None:
    if not in_time:
        raise TimeoutError(pace.complaint)
