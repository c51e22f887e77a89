"""A time that has come for certain, whatever the board's clock says. Pure (docs/protocol.md, "Anchor").

The floor is the highest of several marks. One needs no key: this version cannot have run before it was built. The
others are times that director keys have signed; each is kept under its key, so that a mark falls away with a key that
was stolen (as TUF's fast-forward recovery, specification 5.3.11). Time in operation raises them all; the clock never
does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

BUILD_S = 1_793_491_200.0
"""2026-11-01 in Unix seconds: no board runs this version earlier, whatever its clock says."""
BUILT = ""
"""In place of a key id: the mark that needs none."""
CLOCK_TOLERANCE_S = 300.0
"""A clock that lags by more is wrong: the floor rests on time that was signed, or that passed in operation."""
MAX_S = 2.0**40
"""No anchor names a later time; neither does a store that was not altered."""


@dataclass(frozen=True, slots=True)
class TimeFloor:
    """Marks in Unix seconds by the id of the key that signed them, as they were at the monotonic time ``as_of_s``."""

    marks: Mapping[str, float]
    as_of_s: float

    @classmethod
    def start(cls, stored: Mapping[str, float], monotonic_s: float) -> TimeFloor:
        """Return the floor of a process that begins now; time without power does not count, nobody measured it."""
        known = {key: time_s for key, time_s in stored.items() if BUILD_S <= time_s <= MAX_S}
        return cls({BUILT: BUILD_S, **known}, monotonic_s)

    def at_s(self, monotonic_s: float) -> float:
        """Return the floor in Unix seconds."""
        return max(self.marks.values()) + self._passed_s(monotonic_s)

    @property
    def source(self) -> str:
        """The id of the key on which the floor rests, or ``BUILT``."""
        return max(self.marks, key=lambda key: (self.marks[key], key == BUILT))

    def raised(self, key: str, time_s: float, monotonic_s: float) -> TimeFloor:
        """Return the floor after ``key`` signed that it is ``time_s`` or later now."""
        mark = max(time_s - self._passed_s(monotonic_s), self.marks.get(key, 0.0))
        return replace(self, marks={**self.marks, key: mark})

    def only(self, keys: Collection[str]) -> TimeFloor:
        """Return the floor as it is without the marks of keys that are not in ``keys``."""
        return replace(self, marks={key: mark for key, mark in self.marks.items() if key == BUILT or key in keys})

    def without(self, key: str) -> TimeFloor:
        """Return the floor as it would be had ``key`` signed nothing."""
        return self.only([known for known in self.marks if known != key])

    def doubts(self, monotonic_s: float) -> list[tuple[frozenset[str], float]]:
        """Return what the floor would be without the key that it rests on, without the two highest, and so on."""
        floor, gone, found = self, set[str](), list[tuple[frozenset[str], float]]()
        while floor.source != BUILT:
            gone.add(floor.source)
            floor = floor.without(floor.source)
            found.append((frozenset(gone), floor.at_s(monotonic_s)))
        return found

    def to_store(self, monotonic_s: float) -> dict[str, float]:
        """Return the marks of this moment, for ``start``."""
        passed_s = self._passed_s(monotonic_s)
        return {key: mark + passed_s for key, mark in self.marks.items()}

    def _passed_s(self, monotonic_s: float) -> float:
        return max(0.0, monotonic_s - self.as_of_s)
