"""Which workers have requests in flight, and since when the others have none.

Requests are counted in the API's thread, one lock and no event each; the owner thread reads the counts when it decides
whether a model may leave memory. ``retire`` is the decision: from then on no request begins on that worker, and none
was in flight, so nobody is ever cut off by it. ``hold`` lets it come to that: new requests wait while somebody waits
for the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Use:
    """How a worker is used: requests in flight, and the monotonic time of the last beginning or end of one."""

    active: int
    changed_at_s: float
    retired: bool = False


class Traffic:
    """Thread-safe. Workers are known by their sockets, which are never used twice in one run of the agent."""

    def __init__(
        self,
        monotonic_s: Callable[[], float],
        *,
        on_busy: Callable[[], None] = lambda: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_busy`` is called when a worker gets a request while none is being watched, ``on_idle`` when the last
        request of a worker ends for which that was asked (``await_idle``). Both from any thread; they must only post.
        """
        self._monotonic_s = monotonic_s
        self._on_busy = on_busy
        self._on_idle = on_idle
        self._lock = threading.Lock()
        self._uses: dict[Path, Use] = {}
        self._awaited: set[Path] = set()
        self._held_until_s: dict[Path, float] = {}
        self._watching = False

    def enter(self, socket: Path) -> bool:
        """Count a request that begins; False if the worker has been retired, and the request is not counted."""
        with self._lock:
            use = self._uses.get(socket) or Use(0, 0.0)
            if use.retired:
                return False
            self._uses[socket] = replace(use, active=use.active + 1, changed_at_s=self._monotonic_s())
            news, self._watching = not self._watching, True
        if news:
            self._on_busy()
        return True

    def leave(self, socket: Path) -> None:
        """Count a request that ended."""
        with self._lock:
            use = self._uses.get(socket)
            if use is None:
                return  # its worker is gone
            self._uses[socket] = use = replace(use, active=use.active - 1, changed_at_s=self._monotonic_s())
            news = use.active == 0 and socket in self._awaited
            if news:
                self._awaited.discard(socket)
        if news:
            self._on_idle()

    def look(self, socket: Path) -> Use:
        """Return how the worker is used now."""
        with self._lock:
            return self._uses.get(socket) or Use(0, 0.0)

    def await_idle(self, socket: Path) -> None:
        """Have ``on_idle`` called once when the worker's last request ends; at once if it has none."""
        with self._lock:
            use = self._uses.get(socket)
            idle = use is None or use.active == 0
            if not idle:
                self._awaited.add(socket)
        if idle:
            self._on_idle()

    def rest(self) -> bool:
        """Stop watching if no request is in flight anywhere, so that the next one calls ``on_busy``; tell if so."""
        with self._lock:
            if any(use.active for use in self._uses.values()):
                return False
            self._watching = False
            return True

    def retire(self, socket: Path) -> bool:
        """Let no further request begin on the worker, unless one is in flight; tell whether it is retired."""
        with self._lock:
            use = self._uses.get(socket) or Use(0, 0.0)
            if use.active:
                return False
            self._uses[socket] = replace(use, retired=True)
            return True

    def hold(self, socket: Path, for_s: float) -> None:
        """Let new requests to the worker wait for so many seconds from now."""
        with self._lock:
            self._held_until_s[socket] = self._monotonic_s() + for_s

    def held_s(self, socket: Path) -> float:
        """Return for how many seconds new requests to the worker wait; 0 if not, or if none of them ever begins."""
        with self._lock:
            use = self._uses.get(socket)
            if use is not None and use.retired:
                return 0.0
            return max(0.0, self._held_until_s.get(socket, 0.0) - self._monotonic_s())

    def readmit(self, socket: Path) -> None:
        """Take ``retire`` back: the worker stays."""
        with self._lock:
            self._uses[socket] = replace(self._uses[socket], retired=False)

    def forget(self, socket: Path) -> None:
        """Drop what is known of a worker that is gone."""
        with self._lock:
            self._uses.pop(socket, None)
            self._awaited.discard(socket)
            self._held_until_s.pop(socket, None)
