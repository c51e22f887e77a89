"""Which sequence a prompt gets, and how much of it is known there already. Pure, over a backend's memory.

A sequence keeps what it holds after its answer ended, until its place is needed. A prompt that begins like what any
sequence holds, running or not, takes that part over without reading it: the cells are shared, not copied. What has to
leave to make room goes into the prefix store.

There is always room: a backend has ``context_length`` cells for each sequence, no sequence holds more than that, and
sharing only makes it less. ``take`` bounds what idle sequences hold all the same, because attention passes over every
cell in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from garrison_agent.runtimes.llama.backend import Memory
from garrison_agent.runtimes.llama.prefix_store import PrefixStore, shared

WORTH_SAVING = 64
"""Tokens: reading fewer again costs less than the trouble."""
WORTH_RESTORING = 16


@dataclass(eq=False)
class Place:
    """A sequence of the backend and the tokens whose keys and values it holds."""

    sequence: int
    known: list[int] = field(default_factory=list)
    taken: bool = False
    used_at: int = 0


class Sequences:
    """The places of one model."""

    def __init__(self, memory: Memory, *, count: int, context_length: int, store: PrefixStore) -> None:
        self._memory = memory
        self._context_length = context_length
        self._store = store
        self._places = [Place(sequence) for sequence in range(count)]
        self._uses = 0

    @property
    def has_free(self) -> bool:
        """Tell whether ``take`` would find a place."""
        return any(not place.taken for place in self._places)

    def take(self, tokens: list[int], limit: int) -> Place | None:
        """Return a free place that knows as much as can be had of ``tokens[:limit]`` and nothing else, if there is one.

        It is the one whose conversation goes on, if next to nothing in it is lost; otherwise that unused for longest.
        """
        place = self._choose(tokens, limit)
        if place is None:
            return None
        self._use(place)
        own = self._usable(place.known, tokens, limit)
        saved, stored = self._store.find(tokens, limit, whole=not self._memory.trims)
        if own * 2 < len(place.known):
            self._set_aside(place)
        if saved is not None and stored >= max(own, self._known_elsewhere(place, tokens, limit)) + WORTH_RESTORING:
            self.cut(place, 0)
            restored = self._memory.restore(place.sequence, saved.state)
            if restored:
                place.known.extend(saved.tokens)
            if not restored or stored * 2 >= len(saved.tokens):
                self._store.drop(saved)
        self.cut(place, self._usable(place.known, tokens, limit))
        self.catch_up(place, tokens, limit)
        self._bound_idle(place)
        return place

    def take_oldest(self) -> Place | None:
        """Return the free place unused for longest, with all that it knows."""
        free = [place for place in self._places if not place.taken]
        if not free:
            return None
        place = min(free, key=_age)
        self._set_aside(place)
        self._use(place)
        return place

    def catch_up(self, place: Place, tokens: list[int], limit: int) -> None:
        """Let ``place``, which knows a beginning of ``tokens``, share what another knows beyond that."""
        if not self._memory.trims:
            return
        source, most = place, len(place.known)
        for other in self._places:
            count = shared(other.known, tokens, limit)
            if count > most:
                source, most = other, count
        if source is not place:
            self.cut(place, 0)
            self._memory.share(source.sequence, place.sequence, most)
            place.known.extend(tokens[:most])

    def give_back(self, place: Place) -> None:
        """Free a place; what it knows stays for those who come."""
        place.taken = False

    def cut(self, place: Place, count: int) -> None:
        """Forget all but the first ``count`` tokens; where the model cannot, forget all."""
        if count == len(place.known):
            return
        if not self._memory.forget(place.sequence, count):
            self._memory.forget(place.sequence, 0)
            count = 0
        del place.known[count:]

    def lose_all(self) -> None:
        """Forget everything: the backend cannot be relied on any more."""
        for place in self._places:
            self._memory.forget(place.sequence, 0)
            place.known.clear()

    def _choose(self, tokens: list[int], limit: int) -> Place | None:
        free = [place for place in self._places if not place.taken]
        if not free:
            return None
        going_on: Place | None = None
        most = 0
        for place in free:
            usable, size = self._usable(place.known, tokens, limit), len(place.known)
            if usable > most and usable * 2 >= size and size - usable < WORTH_SAVING:
                going_on, most = place, usable
        return going_on or min(free, key=_age)

    def _use(self, place: Place) -> None:
        self._uses += 1
        place.used_at = self._uses
        place.taken = True

    def _usable(self, known: Sequence[int], tokens: Sequence[int], limit: int) -> int:
        count = shared(known, tokens, limit)
        return count if self._memory.trims or count == len(known) else 0

    def _known_elsewhere(self, place: Place, tokens: Sequence[int], limit: int) -> int:
        if not self._memory.trims:
            return 0
        return max((shared(other.known, tokens, limit) for other in self._places if other is not place), default=0)

    def _set_aside(self, place: Place) -> None:
        """Put a copy of what would be lost with ``place`` into the store, if it is worth it."""
        known, size = place.known, len(place.known)
        if not self._store.limit_bytes or size < WORTH_SAVING:
            return
        remains = max(self._known_elsewhere(place, known, size), self._store.find(known, size)[1])
        if size - remains < WORTH_SAVING:
            return
        state = self._memory.save(place.sequence, self._store.limit_bytes)
        if state is not None:
            self._store.keep(known, state)

    def _bound_idle(self, spared: Place) -> None:
        idle = sorted((p for p in self._places if not p.taken and p is not spared and p.known), key=_age)
        taken = [place for place in self._places if place.taken]
        while idle and self._cells(idle, beside=taken) > self._context_length:
            oldest = idle.pop(0)
            self._set_aside(oldest)
            self.cut(oldest, 0)

    def _cells(self, places: Iterable[Place], *, beside: list[Place]) -> int:
        """Return how many cells ``places`` hold that those ``beside`` them do not; shared ones count once."""
        counted, cells = list(beside), 0
        for place in places:
            size = len(place.known)
            cells += size - max((shared(other.known, place.known, size) for other in counted), default=0)
            counted.append(place)
        return cells


def _age(place: Place) -> tuple[bool, int]:
    """Sort by last use; those that hold nothing first."""
    return bool(place.known), place.used_at
