"""One-off timers of the owner thread: events to handle when their time has come."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from garrison_agent.events import OwnerEvent


class Timers:
    """A heap of events by monotonic time. Owner thread only."""

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._heap: list[tuple[float, int, OwnerEvent]] = []
        self._count = 0

    def after(self, delay_s: float, event: OwnerEvent) -> None:
        """Have ``event`` handled in ``delay_s``."""
        self._count += 1
        heapq.heappush(self._heap, (self._monotonic_s() + delay_s, self._count, event))

    def move(self, delay_s: float, event: OwnerEvent) -> None:
        """Have ``event`` handled in ``delay_s``, and no more at the time that was set for it before."""
        self._heap = [entry for entry in self._heap if entry[2] != event]
        heapq.heapify(self._heap)
        self.after(delay_s, event)

    def next_s(self) -> float | None:
        """Return the time until the next event, 0 if it is due, None if there is none."""
        return max(0.0, self._heap[0][0] - self._monotonic_s()) if self._heap else None

    def due(self) -> OwnerEvent | None:
        """Return the next event whose time has come, or None."""
        if self._heap and self._heap[0][0] <= self._monotonic_s():
            return heapq.heappop(self._heap)[2]
        return None
