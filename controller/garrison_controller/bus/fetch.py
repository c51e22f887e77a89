"""Answers boards that fetch registry bytes over the broker (docs/protocol.md, "Fetch").

Threads of its own, beside the one that commits messages: paho's thread drops a request into a bounded queue, two
threads open requests, and one sends, taking turns among the boards, one chunk each. That only one sends is what makes
the turns hold: of two that wait for room on the connection, either may get it again and again. So however much one
board asks for, between two chunks of another it gets at most one. Only an envelope of an enrolled board is answered.
Chunks are QoS 0: what a board misses it asks for again, and for one that is offline the broker keeps nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from garrison_controller.bus import refusals
from garrison_controller.db.base import Database
from garrison_controller.devices.service import enrolled_device
from garrison_controller.devices.tables import Device
from garrison_protocol import envelope, keys, topics
from garrison_protocol.errors import GarrisonError, InvalidError, RefusedError, UnavailableError
from garrison_protocol.messages.base import parse_message
from garrison_protocol.messages.fetch import (
    FETCH_KIND,
    Chunk,
    ChunkStatus,
    Fetch,
    FetchKind,
    FetchRefusal,
    pack_chunk,
)
from garrison_protocol.topics import Down

OPENERS = 2
"""One may wait for the database meanwhile."""
MAX_FETCH_BYTES = 64 * 1024
PER_BOARD = 4
"""Requests of one board that wait; it has two windows outstanding, and may have given up on two."""
IN_TOTAL = 1024
FETCHES_PER_S = 100.0
"""A board may ask so often, and so many times at once after a pause: each costs a look into the database."""
MAX_BUCKETS = 4096
REFUSAL_EVERY_S = 60.0
FILES = frozenset({FetchKind.METADATA, FetchKind.TARGET, FetchKind.BLOB})
_LOG = logging.getLogger(__name__)


class Answers(Protocol):
    """What boards may fetch. Called in worker threads; raises GarrisonError for what is not to be had."""

    def file(self, fetch: Fetch) -> Path:
        """Return the file that a fetch of metadata, a target, or a blob names."""
        ...

    def document(self, fetch: Fetch) -> bytes:
        """Return the answer to any other fetch of a board whose envelope held."""
        ...


@dataclass
class _Answer:
    """A window on its way out, or one chunk that says why there is none."""

    fetch: Fetch
    offset: int
    total: int
    data: bytes | Path
    refused: GarrisonError | None = None

    @property
    def end(self) -> int:
        return max(self.fetch.offset, min(self.fetch.offset + self.fetch.length, self.total))

    def next_chunk(self) -> Chunk:
        """Return the chunk at ``offset`` and move on."""
        if self.refused is not None:
            return _refusal(self.fetch, self.refused)
        size = min(self.fetch.piece, self.end - self.offset)
        if isinstance(self.data, bytes):
            piece = self.data[self.offset : self.offset + size]
        else:
            piece = _read(self.data, self.offset, size)
        chunk = Chunk(self.fetch.request, self.offset, self.total, ChunkStatus.DATA, piece)
        self.offset += size
        return chunk


@dataclass
class _Board:
    waiting: deque[bytes | _Answer] = field(default_factory=deque)
    """Its requests, the oldest first; that one may have begun to be answered."""


class _Turns:
    """Boards for which threads of one kind have something to do, in the order of their turns."""

    def __init__(self, lock: threading.Lock) -> None:
        self.boards: deque[str] = deque()
        self.changed = threading.Condition(lock)

    def append(self, device: str) -> None:
        """Let the board have its next turn after all others. The caller holds the lock."""
        self.boards.append(device)
        self.changed.notify()


@dataclass
class _Refused:
    count: int = 0
    message: str = ""
    written_at_s: float = float("-inf")


class Fetches:
    """The threads that answer. ``start`` and ``stop`` once each; ``offer`` from any thread."""

    def __init__(
        self,
        database: Database,
        answers: Answers,
        *,
        send: Callable[[str, bytes], bool],
        now: Callable[[], datetime],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``send`` publishes a frame once (QoS 0), waiting for room; False: there is no connection."""
        self._database, self._answers = database, answers
        self._send, self._now, self._monotonic_s = send, now, monotonic_s
        self._lock = threading.Lock()
        self._boards: dict[str, _Board] = {}
        self._to_open, self._to_send = _Turns(self._lock), _Turns(self._lock)
        self._count = 0
        self._buckets: dict[str, tuple[float, float]] = {}
        self._refused: dict[tuple[str, str], _Refused] = {}
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, args=(turns,), name="fetch", daemon=True)
            for turns in (self._to_send, *[self._to_open] * OPENERS)
        ]

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the chunks at hand."""
        with self._lock:
            self._stopping = True
            self._to_open.changed.notify_all()
            self._to_send.changed.notify_all()
        for thread in self._threads:
            thread.join()

    def offer(self, device: str, payload: bytes) -> bool:
        """Take a request from the topic of ``device``; False: dropped, since too many wait or came. Never waits."""
        with self._lock:
            board = self._boards.get(device)
            if len(payload) > MAX_FETCH_BYTES or self._count >= IN_TOTAL or not self._admit(device):
                return False
            if board is None:
                board = self._boards[device] = _Board()
                self._to_open.append(device)
            elif len(board.waiting) >= PER_BOARD:
                return False
            board.waiting.append(payload)
            self._count += 1
            return True

    def _admit(self, device: str) -> bool:
        """Take a token out of the bucket of ``device``."""
        now_s = self._monotonic_s()
        tokens, at_s = self._buckets.get(device, (FETCHES_PER_S, now_s))
        tokens = min(FETCHES_PER_S, tokens + (now_s - at_s) * FETCHES_PER_S)
        if len(self._buckets) >= MAX_BUCKETS and device not in self._buckets:
            self._buckets = {one: kept for one, kept in self._buckets.items() if now_s - kept[1] < 1}
            if len(self._buckets) >= MAX_BUCKETS:
                return False
        self._buckets[device] = (tokens - 1 if tokens >= 1 else tokens, now_s)
        return tokens >= 1

    def _run(self, turns: _Turns) -> None:
        while True:
            with self._lock:
                turns.changed.wait_for(lambda: self._stopping or turns.boards)
                if self._stopping:
                    return
                device = turns.boards.popleft()
                item = self._boards[device].waiting[0]
            rest: _Answer | None = None
            try:
                rest = self._sent(item) if isinstance(item, _Answer) else self._opened(device, item)
            except Exception:  # noqa: BLE001 -- one request must not end the thread that serves every board
                _LOG.exception("a fetch of %s failed", device)
            with self._lock:
                self._put_back(device, rest)

    def _put_back(self, device: str, rest: _Answer | None) -> None:
        """Replace the oldest request of ``device`` by what is left of it, and line the board up again."""
        waiting = self._boards[device].waiting
        if rest is None:
            waiting.popleft()
            self._count -= 1
        else:
            waiting[0] = rest
        if not waiting:
            del self._boards[device]
        elif isinstance(waiting[0], _Answer):
            self._to_send.append(device)
        else:
            self._to_open.append(device)

    def _sent(self, answer: _Answer) -> _Answer | None:
        """Send the next chunk; return what is left."""
        try:
            chunk = answer.next_chunk()
        except (GarrisonError, OSError) as error:
            return _refused(answer.fetch, error)
        sent = self._send(topics.down(answer.fetch.device, Down.CHUNK), pack_chunk(chunk))
        return answer if sent and answer.offset < answer.end else None

    def _opened(self, device: str, sealed: bytes) -> _Answer | None:
        """Return what is to be sent for a request; None where it is only counted."""
        try:
            fetch = self._unsealed(device, sealed)
        except (GarrisonError, SQLAlchemyError) as error:
            self._count_refusal(device, _as_refusal(device, error))
            return None
        try:
            return self._answer(fetch)
        except (GarrisonError, SQLAlchemyError, OSError) as error:
            return _refused(fetch, error)

    def _unsealed(self, device_id: str, payload: bytes) -> Fetch:
        """Return the request, once the envelope is by the identity key of the board that the topic names.

        Raises:
            RefusedError: ``device.unknown``, ``message.misplaced``; as ``envelope.unseal``.
            InvalidError: as ``envelope.unseal`` and ``parse_message``.
        """
        with self._database.reading() as session:
            device = session.get(Device, device_id)
            identity = None if device is None else device.identity_public
        if identity is None:
            raise RefusedError("device.unknown", f"no board {device_id} is enrolled")
        opened = envelope.unseal(payload, lambda signer: identity if signer == keys.key_id(identity) else None)
        if opened.kind != FETCH_KIND:
            raise RefusedError("message.misplaced", f"a {opened.kind[:40]} message on the topic of fetches")
        return parse_message(Fetch, opened.body, device=device_id)

    def _answer(self, fetch: Fetch) -> _Answer:
        with self._database.reading() as session:
            enrolled_device(session, fetch.device)
        if fetch.kind in FILES:
            path = self._answers.file(fetch)
            return _Answer(fetch, fetch.offset, path.stat().st_size, path)
        document = self._answers.document(fetch)
        if len(document) > min(fetch.length, fetch.piece):
            raise InvalidError("fetch.window_too_small", f"the answer has {len(document)} bytes", hint="ask for more")
        return _Answer(fetch, 0, len(document), document)

    def _count_refusal(self, device: str, error: GarrisonError) -> None:
        """Count what was not answered; write it down at most once a minute for each board and code."""
        sender = "" if error.code == "device.unknown" else device
        now_s = self._monotonic_s()
        with self._lock:
            known = self._refused.setdefault((sender, error.code), _Refused())
            known.count, known.message = known.count + 1, error.message
            if now_s - known.written_at_s < REFUSAL_EVERY_S:
                return
            count, known.count, known.written_at_s = known.count, 0, now_s
        try:
            with self._database.session() as session:
                refusals.count(session, sender, error.code, error.message, self._now(), times=count)
        except (GarrisonError, SQLAlchemyError) as failed:
            _LOG.warning("a refused fetch of %s could not be counted: %s", device, failed)


def _read(path: Path, offset: int, size: int) -> bytes:
    if size == 0:
        return b""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        piece = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(piece) != size:
        raise UnavailableError("fetch.failed", "the file was replaced meanwhile", hint="ask again", retryable=True)
    return piece


def _refused(fetch: Fetch, error: GarrisonError | SQLAlchemyError | OSError) -> _Answer:
    return _Answer(fetch, fetch.offset, 0, b"", _as_refusal(fetch.device, error))


def _as_refusal(device: str, error: GarrisonError | SQLAlchemyError | OSError) -> GarrisonError:
    if isinstance(error, GarrisonError):
        return error
    _LOG.warning("a fetch of %s cannot be answered: %s", device, error)
    return UnavailableError("fetch.failed", "the controller cannot answer now", retryable=True)


def _refusal(fetch: Fetch, error: GarrisonError) -> Chunk:
    refusal = FetchRefusal(
        code=error.code,
        message=error.message[:500],
        hint=error.hint[:500],
        retryable=error.retryable,
        status=error.http_status,
    )
    return Chunk(fetch.request, fetch.offset, 0, ChunkStatus.ERROR, refusal.model_dump_json().encode())
