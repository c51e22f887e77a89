"""This board's sense of time: its clock, and the floor below which nothing is judged (``core.time_floor``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from garrison_agent.adapters.database import Database
from garrison_agent.core.slot import Now
from garrison_agent.core.time_floor import CLOCK_TOLERANCE_S, TimeFloor
from garrison_agent.outbox.journal import Journal
from garrison_protocol.errors import GarrisonError
from garrison_protocol.states import Stream

STORE_EVERY_S = 600.0
"""A floor that rose is stored at most this often, so that a power cut takes back no more and flash is spared."""
_FLOOR = "time.floor"


class Timekeeper:
    """Holds the floor. Any thread may read it; only the owner thread raises, lowers, and stores it."""

    def __init__(self, *, database: Database, journal: Journal, now: Callable[[], Now]) -> None:
        self._database = database
        self._journal = journal
        self._now = now
        monotonic_s = now().monotonic_s
        self._floor = TimeFloor.start(_stored(database), monotonic_s)
        self._stored_at = monotonic_s
        self.anchored_at: float | None = None
        """Monotonic seconds of the last anchor that was believed; None: none since the agent started."""

    def now_s(self) -> float:
        """Return the later of clock and floor in Unix seconds: what everything that ends is judged by."""
        now = self._now()
        return max(now.wall_s, self._floor.at_s(now.monotonic_s))

    def judge_at(self) -> datetime:
        """Return ``now_s`` as aware UTC."""
        return datetime.fromtimestamp(self.now_s(), UTC)

    def floor_s(self) -> float:
        """Return the floor in Unix seconds."""
        return self._floor.at_s(self._now().monotonic_s)

    def doubts(self) -> list[tuple[frozenset[str], float]]:
        """Return the floor as it would be without the keys that it rests on: see ``TimeFloor.doubts``."""
        return self._floor.doubts(self._now().monotonic_s)

    @property
    def source(self) -> str:
        """The id of the director key on which the floor rests; empty: on none."""
        return self._floor.source

    @property
    def clock_s(self) -> float:
        """The board's own clock in Unix seconds; information, never the only judge."""
        return self._now().wall_s

    @property
    def uncertain(self) -> bool:
        """Whether the clock is known to be wrong and no anchor has told the time since the agent started."""
        return self.anchored_at is None and self.clock_s < self.floor_s() - CLOCK_TOLERANCE_S

    def note(self, key: str, time_s: float) -> TimeFloor:
        """Store, in the caller's transaction, that ``key`` signed ``time_s``, and return what ``believe`` takes then.

        It is stored at once if it lies far above what is stored.

        Raises:
            InsufficientError: ``disk.full``; nothing changed.
        """
        now = self._now()
        before = self._floor
        floor = before.raised(key, time_s, now.monotonic_s)
        new = key not in before.marks or time_s - before.at_s(now.monotonic_s) >= STORE_EVERY_S
        if new:
            self._store(floor)
        if new or (self.anchored_at is None and abs(now.wall_s - time_s) > CLOCK_TOLERANCE_S):
            facts: dict[str, str | int | bool | None] = {
                "time": int(time_s),
                "signer": key,
                "clock": int(now.wall_s),
                "floor": int(floor.at_s(now.monotonic_s)),
            }
            self._journal.append(Stream.AUDIT, "time.anchored", facts)
        return floor

    def believe(self, floor: TimeFloor) -> bool:
        """Go by ``floor``, once it is stored; tell whether it had seemed to be much earlier."""
        monotonic_s = self._now().monotonic_s
        jumped = floor.at_s(monotonic_s) > self.now_s() + CLOCK_TOLERANCE_S
        self._floor = floor
        self.anchored_at = monotonic_s
        return jumped

    def listed(self, keys: Collection[str]) -> bool:
        """Forget what keys said that ``fleet.json`` no longer lists; tell whether the floor fell by that."""
        floor = self._floor.only(keys)
        if floor.marks == self._floor.marks:
            return False
        monotonic_s = self._now().monotonic_s
        before_s, after_s = self._floor.at_s(monotonic_s), floor.at_s(monotonic_s)
        gone = sorted(self._floor.marks.keys() - floor.marks.keys())
        with self._database.transaction():
            self._store(floor)
            facts: dict[str, str | int | bool | None] = {"before": int(before_s), "floor": int(after_s)}
            self._journal.append(Stream.AUDIT, "time.key_gone", {"signers": ",".join(gone), **facts})
        self._floor = floor
        if after_s < before_s:
            self.anchored_at = None
        return after_s < before_s

    def keep(self, *, ending: bool = False) -> None:
        """Store the floor if that is due, or the process is ``ending``.

        Raises:
            InsufficientError: ``disk.full``.
        """
        if ending or self._now().monotonic_s - self._stored_at >= STORE_EVERY_S:
            self._store(self._floor, spare=True)

    def _store(self, floor: TimeFloor, *, spare: bool = False) -> None:
        monotonic_s = self._now().monotonic_s
        marks = {key: round(mark) for key, mark in floor.to_store(monotonic_s).items()}
        self._database.put(_FLOOR, json.dumps(marks), spare=spare)
        self._stored_at = monotonic_s


def _stored(database: Database) -> dict[str, float]:
    """Return the stored marks.

    Raises:
        GarrisonError: ``database.damaged``.
    """
    text = database.get(_FLOOR)
    if text is None:
        return {}
    try:
        return {str(key): float(mark) for key, mark in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise GarrisonError(
            "database.damaged",
            f"{database.path} holds a time that cannot be read",
            hint="keep a copy for the auditor, move the file away, and start the agent; it opens a new epoch",
        ) from error
