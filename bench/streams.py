"""A client of nothing but a socket, so that what is measured is the server: one streamed answer, timed."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Streamed:
    """One answer: monotonic seconds of its request, first text, and end; its text and the tokens it was asked for."""

    began_s: float
    first_s: float
    ended_s: float
    tokens: int
    text: str

    @property
    def to_first_s(self) -> float:
        """Seconds until the first text came."""
        return self.first_s - self.began_s


def stream(port: int, path: str, body: dict[str, Any]) -> Streamed:
    """Return the streamed answer to ``body``, which must run to its ``max_tokens``: that is how tokens are counted.

    Raises:
        ValueError: The answer is an error, or ended before ``max_tokens``.
    """
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    began_s = time.perf_counter()
    first_s = 0.0
    got = bytearray()
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        while part := connection.recv(65536):
            got += part
            if not first_s and _has_text(got):
                first_s = time.perf_counter()
    ended_s = time.perf_counter()
    text, finish = _read(bytes(got))
    if finish != "length":
        raise ValueError(f"the answer ended with {finish!r} instead of running to its length: {bytes(got)[:300]!r}")
    return Streamed(began_s, first_s, ended_s, int(body["max_tokens"]), text)


def side_by_side(port: int, path: str, bodies: Sequence[dict[str, Any]]) -> list[Streamed]:
    """Return the answers to ``bodies``, all asked for at once."""
    barrier = threading.Barrier(len(bodies))

    def one(body: dict[str, Any]) -> Streamed:
        barrier.wait()
        return stream(port, path, body)

    with ThreadPoolExecutor(len(bodies)) as clients:
        return list(clients.map(one, bodies))


def rate(answers: Sequence[Streamed]) -> float:
    """Return the tokens per second of all ``answers`` together, from the first request to the last end."""
    took_s = max(one.ended_s for one in answers) - min(one.began_s for one in answers)
    return sum(one.tokens for one in answers) / took_s


def _has_text(got: bytearray) -> bool:
    return any(_piece(choice) for event in _events(bytes(got)) for choice in event.get("choices", []))


def _read(got: bytes) -> tuple[str, str | None]:
    text, finish = "", None
    for event in _events(got):
        for choice in event.get("choices", []):
            text += _piece(choice)
            finish = choice.get("finish_reason") or finish
    return text, finish


def _piece(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def _events(got: bytes) -> list[dict[str, Any]]:
    """Return the complete events so far. A chunk's size may stand between lines, never inside one that matters."""
    found = []
    for line in got.split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                found.append(json.loads(line[6:]))
            except ValueError:
                continue  # cut off where the socket's data ends for now
    return found
