"""The command line as the agent's hands: it reads a stick with its caller's rights, piece by piece, as the agent asks.

The agent's unit sees no removable media, and its user may not read them. So ``garrison-agent import`` opens the files,
and the agent names what it wants; nothing is copied twice. Jobs ask in their threads, the API answers in its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerError
from dataclasses import dataclass
from typing import TypedDict

from pydantic import BaseModel, Field, ValidationError

from garrison_protocol.errors import GarrisonError, NotFoundError, UnavailableError

ANSWER_S = 60.0
"""A stick may be slow; a command line that has gone must not hold a job for ever."""
MAX_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """One piece of a file that somebody waits for."""

    number: int
    path: str
    offset: int
    length: int


class _Failure(BaseModel):
    code: str = Field(max_length=64)
    message: str = Field(max_length=1000)


class ImportItem(TypedDict):
    """What became of one part of a bundle. ``outcome``: new, unchanged, older, missing, waiting, or refused."""

    what: str
    outcome: str
    code: str | None
    message: str


class ImportedAlias(TypedDict):
    """How far an alias was when the bundle was no longer needed."""

    alias: str
    package: str
    state: str
    error_code: str | None
    error_message: str | None


class ImportResult(TypedDict):
    """Everything that came of a bundle."""

    device: str
    fleet: str
    created: int
    valid_until: int
    items: list[ImportItem]
    aliases: list[ImportedAlias]


class ImportProgress(TypedDict):
    """Where an import stands: ``reading``, ``checking``, or ``fetching``, and bytes of the models that it brings."""

    phase: str
    done: int
    total: int


class Carrier:
    """One import. The owner makes it; jobs' threads call ``read_piece``, the API's ``listen``, ``take``, ``answer``."""

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic, answer_s: float = ANSWER_S) -> None:
        self.id = os.urandom(16).hex()
        self.progress = ImportProgress(phase="reading", done=0, total=0)
        """Swapped whole by the owner."""
        self._monotonic_s = monotonic_s
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._count = 0
        self._asked: deque[Wanted] = deque()
        self._open: dict[int, Future[bytes]] = {}
        self._listener: Callable[[], object] | None = None
        self._heard_at = monotonic_s()
        self._ended: ImportResult | GarrisonError | None = None

    def read_piece(self, path: str, offset: int, length: int) -> bytes:
        """See ``registry.bundle_source.Reader``."""
        answer: Future[bytes] = Future()
        with self._lock:
            if self._ended is not None:
                raise _gone()
            number = self._count = self._count + 1
            self._open[number] = answer
            self._asked.append(Wanted(number, path, offset, min(length, MAX_PIECE_BYTES)))
            listener = self._listener
        if listener is not None:
            listener()
        try:
            data = answer.result(self._answer_s)
        except NoAnswerError as error:
            raise _gone() from error
        finally:
            with self._lock:
                self._open.pop(number, None)
        if len(data) > length:
            raise _gone()
        return data

    def listen(self, listener: Callable[[], object] | None) -> None:
        """Call ``listener`` from any thread when something is wanted or the import has ended; at once if it is so."""
        with self._lock:
            self._heard_at = self._monotonic_s()
            self._listener = listener
            due = bool(self._asked) or self._ended is not None
        if due and listener is not None:
            listener()

    def take(self) -> Wanted | None:
        """Return the next piece that is wanted; whoever takes it answers."""
        with self._lock:
            return self._asked.popleft() if self._asked else None

    def answer(self, number: int, data: bytes | GarrisonError) -> None:
        """Give the job its piece; one that nobody waits for any more is dropped."""
        with self._lock:
            waiting = self._open.pop(number, None)
        if waiting is None:
            return
        if isinstance(data, GarrisonError):
            waiting.set_exception(data)
        else:
            waiting.set_result(data)

    def end(self, result: ImportResult | GarrisonError) -> None:
        """Say how the import ended; whoever still waits for a piece waits in vain. Only the first word counts."""
        with self._lock:
            self._ended = self._ended or result
            waiting, self._open = list(self._open.values()), {}
            self._asked.clear()
            listener = self._listener
        for answer in waiting:
            answer.set_exception(_gone())
        if listener is not None:
            listener()

    @property
    def result(self) -> ImportResult | GarrisonError | None:
        """How it ended; None: it has not."""
        return self._ended

    @property
    def idle_s(self) -> float:
        """For how long nobody has come to read for it."""
        with self._lock:
            return 0.0 if self._listener is not None else self._monotonic_s() - self._heard_at


def _gone() -> UnavailableError:
    return UnavailableError(
        "bundle.reader_gone",
        "the command that read the stick has ended, or did not answer in time",
        hint="run `garrison-agent import` again; what was copied stays",
        retryable=True,
    )


def parse_failure(body: bytes) -> GarrisonError:
    """Return the error that the command line met on the stick: only whether the file is missing makes a difference."""
    try:
        failure = _Failure.model_validate_json(body)
    except ValidationError:
        failure = _Failure(code="bundle.unreadable", message="the stick cannot be read")
    if failure.code == "bundle.file_missing":
        return NotFoundError(failure.code, failure.message)
    return UnavailableError("bundle.unreadable", failure.message, retryable=True)
