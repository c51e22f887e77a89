"""What may be in memory together: what comes in, what leaves for it, and when a model leaves by itself. Pure.

Sizes are what workers take (``core.estimate``), in MiB. Nothing here ever lets the sum exceed the budget; nothing that
is pinned or busy ever leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

MIN_TURN_S = 5.0
"""So long at least a model serves before it makes way for one that somebody waits for."""
FOR_EVER_S = 10 * 365 * 86400.0
"""A keep-alive of so long is for ever; no clock or calendar has to count further."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory that an alias holds: a loaded model, one on its way there, or room kept for a rollback."""

    alias: str
    memory_mb: int
    busy: bool = True
    """Requests are in flight, or a deployment needs it: it does not leave."""
    pinned: bool = False
    fleeting: bool = False
    """It would leave by itself when its keep-alive ends."""
    idle_s: float = 0.0
    """Since its last use."""
    load_s: float = 1.0
    """How long it took to load."""
    served_s: float = 0.0
    """Since it was ready."""
    in_use: bool = False
    """Requests in flight are all that keeps it."""

    @property
    def may_leave(self) -> bool:
        """Whether it can make room for another."""
        return not self.busy and not self.pinned

    @property
    def had_its_turn(self) -> bool:
        """Whether it served at least as long as loading it took: models that take turns serve half of the time."""
        return self.served_s >= max(MIN_TURN_S, self.load_s)

    @property
    def worth(self) -> float:
        """What it would cost to have it back, less with every second that nobody asks for it."""
        return self.memory_mb * self.load_s / (1.0 + self.idle_s)


class Placement(StrEnum):
    """How a candidate comes into memory."""

    BESIDE = "beside"
    INSTEAD = "instead"
    BUSY = "busy"
    """Other aliases hold the memory; it may become free."""
    NEVER = "never"
    """More than the whole budget."""


@dataclass(frozen=True, slots=True)
class Room:
    """There is room once the models of ``leaving`` have left."""

    leaving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shortage:
    """There is no room, and would be none if everything left that may."""

    needed_mb: int
    budget_mb: int
    held_mb: int
    """By what does not leave."""
    holders: tuple[tuple[str, str], ...]
    """Alias, and why it stays: what would have to go."""
    pinned_mb: int = 0
    """How much of it never leaves by itself."""

    @property
    def missing_mb(self) -> int:
        """By how much it does not fit."""
        return self.needed_mb + self.held_mb - self.budget_mb

    @property
    def hopeless(self) -> bool:
        """Whether it would not fit into an empty memory either."""
        return self.needed_mb > self.budget_mb

    @property
    def passing(self) -> bool:
        """Whether it fits once what is in use is so no more."""
        return self.needed_mb + self.pinned_mb <= self.budget_mb

    @property
    def message(self) -> str:
        """What is missing, and what would have to go for it."""
        needs = f"needs {self.needed_mb} MiB of memory, the budget is {self.budget_mb} MiB"
        if self.hopeless:
            return f"{needs}: {self.needed_mb - self.budget_mb} MiB too much even with nothing else loaded"
        stay = ", ".join(f"{alias} ({why})" for alias, why in self.holders)
        return (
            f"{needs}, {self.held_mb} MiB of it are held: {self.missing_mb} MiB are missing; would have to go: {stay}"
        )


def place(alias: str, needed_mb: int, budget_mb: int, loaded: Iterable[Resident]) -> Placement:
    """Return how a candidate for ``alias`` comes into memory.

    ``loaded`` holds every model that is in memory or on its way there. The serving model of ``alias`` leaves only if
    that is what makes room: a switch without a gap is worth more than the memory.
    """
    if needed_mb > budget_mb:
        return Placement.NEVER
    residents = list(loaded)
    used_mb = sum(resident.memory_mb for resident in residents)
    if used_mb + needed_mb <= budget_mb:
        return Placement.BESIDE
    own_mb = sum(resident.memory_mb for resident in residents if resident.alias == alias)
    if own_mb and used_mb - own_mb + needed_mb <= budget_mb:
        return Placement.INSTEAD
    return Placement.BUSY


def place_evicting(
    alias: str, needed_mb: int, budget_mb: int, loaded: Sequence[Resident]
) -> tuple[Placement, tuple[str, ...]]:
    """Return how a candidate for ``alias`` comes into memory, and which other aliases' models leave for it.

    A deployment sends away only what is idle and would leave by itself sooner or later: other models of the board were
    put into service by somebody too. The serving model of ``alias`` stays if that can be had.
    """
    placement = place(alias, needed_mb, budget_mb, loaded)
    if placement is not Placement.BUSY:
        return placement, ()
    own = [resident for resident in loaded if resident.alias == alias]
    others = [resident for resident in loaded if resident.alias != alias]
    own_mb = sum(resident.memory_mb for resident in own)
    for wanted, kept_mb in ((Placement.BESIDE, own_mb), (Placement.INSTEAD, 0)):
        room = make_room(needed_mb + kept_mb, budget_mb, others, fleeting_only=True)
        if isinstance(room, Room) and (own_mb or wanted is Placement.BESIDE):
            return wanted, room.leaving
    return Placement.BUSY, ()


def make_room(
    needed_mb: int, budget_mb: int, loaded: Iterable[Resident], *, fleeting_only: bool = False
) -> Room | Shortage:
    """Return what leaves so that ``needed_mb`` more fit: the least recently used, weighted by what loading them costs.

    As little as possible leaves: whatever turns out not to be needed for the room stays.
    """
    residents = list(loaded)
    used_mb = sum(resident.memory_mb for resident in residents)
    free_mb = budget_mb - used_mb
    if needed_mb <= free_mb:
        return Room()
    idle = [one for one in residents if one.may_leave and (one.fleeting or not fleeting_only)]
    if needed_mb > free_mb + sum(one.memory_mb for one in idle):
        stays = [one for one in residents if one not in idle]
        held_mb, pinned_mb = (sum(one.memory_mb for one in of) for of in (stays, (one for one in stays if one.pinned)))
        return Shortage(needed_mb, budget_mb, held_mb, tuple(_holders(stays).items()), pinned_mb)
    leaving: list[Resident] = []
    for one in sorted(idle, key=lambda one: (one.worth, one.alias)):
        if needed_mb <= free_mb:
            break
        leaving.append(one)
        free_mb += one.memory_mb
    for one in sorted(leaving, key=lambda one: (-one.worth, one.alias)):
        if needed_mb <= free_mb - one.memory_mb:
            leaving.remove(one)
            free_mb -= one.memory_mb
    return Room(tuple(one.alias for one in leaving))


def make_way(needed_mb: int, budget_mb: int, loaded: Iterable[Resident]) -> tuple[str, ...]:
    """Return which models in use get no new request for now, so that ``needed_mb`` fit once theirs have ended.

    Without this, one that always has a request in flight would never leave. Nobody, if others would be in the way
    even then.
    """
    residents = list(loaded)
    yielding = {one.alias for one in residents if one.in_use and not one.pinned and one.had_its_turn}
    room = make_room(
        needed_mb, budget_mb, [replace(one, busy=False) if one.alias in yielding else one for one in residents]
    )
    return tuple(alias for alias in room.leaving if alias in yielding) if isinstance(room, Room) else ()


def keep_alive(seconds: float) -> float:
    """Return how long a model stays that shall stay for ``seconds``, perhaps more than a float holds; -1: for ever."""
    return -1.0 if seconds < 0 or seconds >= FOR_EVER_S else float(seconds)


def expires_in_s(keep_alive_s: float, *, active: int, idle_s: float) -> float | None:
    """Return in how many seconds a model leaves by itself, 0 if it is time; None: not as things stand.

    A negative ``keep_alive_s`` means never. With requests in flight the time has not begun.
    """
    if keep_alive_s < 0 or active:
        return None
    return max(0.0, keep_alive_s - idle_s)


def _holders(residents: Iterable[Resident]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in residents:
        if one.memory_mb:
            found[one.alias] = "pinned" if one.pinned else "in use" if one.busy else "in service"
    return found
