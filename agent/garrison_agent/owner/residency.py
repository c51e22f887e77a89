"""What stays in memory: who makes room for whom, and whose time is over. The decisions are ``core.residency``'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from garrison_agent.api.commands import LoadedView
from garrison_agent.api.traffic import Traffic
from garrison_agent.core.deployment import SWITCHING
from garrison_agent.core.residency import (
    Placement,
    Resident,
    Room,
    Shortage,
    expires_in_s,
    keep_alive,
    make_room,
    make_way,
    place_evicting,
)
from garrison_agent.core.slot import Event, Now, Phase, Slot, UnloadWanted
from garrison_agent.events import Tick
from garrison_agent.owner.estimates import Estimates
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.workers import Loaded, Workers
from garrison_protocol.errors import GarrisonError, InsufficientError
from garrison_protocol.manifest import PackageRef
from garrison_protocol.states import DeploymentState

ARRIVAL_S = 2.0
"""A model that somebody waited for does not leave before his request had time to reach it."""
HOLD_S = 3.0
"""Who waits for memory asks again before this has passed."""
_MIB = 1024 * 1024


class Slots(Protocol):
    """Who holds the slots."""

    @property
    def slots(self) -> Mapping[str, Slot]:
        """Every alias this board has or had."""
        ...

    def deliver(self, alias: str, event: Event) -> None:
        """Apply one event to one alias."""
        ...


class Residency:
    """Owner thread only. ``settle`` sees to it that a timer is set for the next model whose time ends."""

    def __init__(
        self,
        *,
        workers: Workers,
        estimates: Estimates,
        traffic: Traffic,
        timers: Timers,
        slots: Callable[[], Slots],
        now: Callable[[], Now],
        budget_mb: int,
        keep_alive_s: float,
        pinned: tuple[str, ...],
    ) -> None:
        self._workers = workers
        self._estimates = estimates
        self._traffic = traffic
        self._timers = timers
        self._slots = slots
        self._now = now
        self.budget_mb = budget_mb
        self._default_s = keep_alive(keep_alive_s)
        self._pinned = frozenset(pinned)
        self._asked: dict[str, float] = {}
        """Keep-alives that requests or operators asked for, by alias, until the model leaves memory."""
        self._promised: dict[str, Resident] = {}
        """Memory given to candidates whose workers are not started yet."""
        self._due_s = float("inf")

    def keep_alive_s(self, alias: str) -> float:
        """Return how long the alias's model stays after its last use; negative: for ever."""
        return -1.0 if alias in self._pinned else self._asked.get(alias, self._default_s)

    def set_keep_alive(self, alias: str, keep_alive_s: float) -> None:
        """Let the alias's model stay so long after its last use, until it leaves memory or this is set anew."""
        self._asked[alias] = keep_alive(keep_alive_s)

    def promise(self, alias: str, memory_mb: int) -> None:
        """Keep memory for a candidate that will be started."""
        self._promised[alias] = Resident(alias, memory_mb)

    def release(self, alias: str) -> None:
        """Give up what was promised to the alias: its worker starts now, or never."""
        self._promised.pop(alias, None)

    def place(self, alias: str, package: PackageRef, variant: str) -> tuple[Placement, int]:
        """Decide how a candidate comes into memory, make the room, and keep it; return that and its size in MiB.

        Raises:
            GarrisonError: The package's manifest is not on this disk.
        """
        needed_mb = self._estimates.need_mb(package, variant)
        others = [one for one in self._promised.values() if one.alias != alias]
        wanted: set[str] = set()
        while True:
            loaded = _in_use(self.residents(), wanted)
            placement, leaving = place_evicting(alias, needed_mb, self.budget_mb, [*loaded, *others])
            if self._evict(leaving, wanted):
                break
        if placement in (Placement.BESIDE, Placement.INSTEAD):
            self.promise(alias, needed_mb)
        return placement, needed_mb

    def make_room(self, slot: Slot, package: PackageRef, variant: str, *, waits: bool = False) -> None:
        """Send away what is idle until the slot's serving package fits.

        ``waits``: whoever wants it asks again soon; models in use that are in the way get no new requests meanwhile.

        Raises:
            InsufficientError: ``memory.insufficient`` (it never fits), ``memory.busy`` (what holds the memory is in use
                or pinned); the message says by how much it does not fit.
            GarrisonError: The package's manifest is not on this disk.
        """
        needed_mb = self._estimates.need_mb(package, variant)
        others = [one for one in self._promised.values() if one.alias != slot.alias]
        wanted: set[str] = set()
        while True:
            loaded = _in_use(self.residents(coming=(slot.alias, package)), wanted)
            room = make_room(needed_mb, self.budget_mb, [*loaded, *others])
            if isinstance(room, Shortage):
                if waits:
                    self._hold(make_way(needed_mb, self.budget_mb, [*loaded, *others]))
                raise _insufficient(package, room)
            assert isinstance(room, Room)
            if self._evict(room.leaving, wanted):
                return

    def residents(self, *, coming: tuple[str, PackageRef] | None = None) -> list[Resident]:
        """Return what holds memory: models that are loaded or on their way, and room for the rollback of a switch.

        Neither what is ``coming`` is counted, nor the room kept for its alias, which it is about to take. A candidate
        of that alias is.
        """
        slots, now_s = self._slots().slots, self._now().monotonic_s
        ready = {(one.alias, one.package): one for one in self._workers.loaded()}
        held: dict[str, int] = {}
        found = []
        for alias, package, memory_mb in self._workers.memory_mb():
            if (alias, package) == coming:
                continue
            held[alias] = held.get(alias, 0) + memory_mb
            found.append(self._resident(slots.get(alias), memory_mb, ready.get((alias, package)), alias, now_s))
        for alias, slot in slots.items():
            extra_mb = self._restorable_mb(slot) - held.get(alias, 0)
            if extra_mb > 0 and (coming is None or alias != coming[0]):
                found.append(Resident(alias, extra_mb))
        return found

    def views(self) -> list[LoadedView]:
        """Return the models that are ready to serve."""
        slots, now = self._slots().slots, self._now()
        views = []
        for one in self._workers.loaded():
            slot = slots.get(one.alias)
            if slot is None or slot.serving is None or slot.serving.package != one.package:
                continue  # a candidate: nobody is served by it
            use = self._traffic.look(one.socket)
            rest_s = None if slot.state in SWITCHING else self._rest_s(slot, one, now.monotonic_s)
            views.append(
                LoadedView(
                    alias=one.alias,
                    id=one.package.id,
                    size_bytes=one.memory_mb * _MIB,
                    loaded_since=int(one.ready_at),
                    expires_at=None if rest_s is None else int(now.wall_s + rest_s),
                    pinned=one.alias in self._pinned,
                    active=use.active,
                )
            )
        return views

    def pinned(self, alias: str) -> bool:
        """Tell whether the alias's model never leaves by itself."""
        return alias in self._pinned

    def settle(self) -> None:
        """Set a timer for the next model whose time ends; forget what was asked for models that left memory."""
        if self._default_s < 0 and not self._asked:
            return
        slots = self._slots().slots
        for alias in list(self._asked):
            if alias not in slots or slots[alias].state is DeploymentState.REMOVED:
                del self._asked[alias]
        rest_s = min((rest_s for _, rest_s in self._expiring()), default=None)
        now_s = self._now().monotonic_s
        if rest_s is not None and now_s + rest_s < self._due_s:
            self._due_s = now_s + rest_s
            self._timers.move(rest_s, Tick.IDLE)

    def due(self) -> None:
        """Unload every model whose time is over."""
        self._due_s = float("inf")
        for alias in [alias for alias, rest_s in self._expiring() if rest_s <= 0]:
            self._unload(alias, "idle")

    def left(self, alias: str) -> None:
        """Forget the keep-alive that was asked for: the model left memory."""
        self._asked.pop(alias, None)

    def _expiring(self) -> list[tuple[str, float]]:
        """Return the seconds that the models have still which leave by themselves, where nothing is in flight."""
        slots, now_s = self._slots().slots, self._now().monotonic_s
        found = []
        for one in self._workers.loaded():
            slot = slots.get(one.alias)
            if slot is None or not _may_leave(slot, one):
                continue
            rest_s = self._rest_s(slot, one, now_s)
            if rest_s is not None:
                found.append((one.alias, rest_s))
            elif self.keep_alive_s(one.alias) >= 0:
                self._traffic.await_idle(one.socket)
        return found

    def _rest_s(self, slot: Slot, one: Loaded, now_s: float) -> float | None:
        use = self._traffic.look(one.socket)
        idle_s = now_s - max(use.changed_at_s, slot.ready_at_s)
        return expires_in_s(self.keep_alive_s(one.alias), active=use.active, idle_s=idle_s)

    def _resident(self, slot: Slot | None, memory_mb: int, one: Loaded | None, alias: str, now_s: float) -> Resident:
        if slot is None or one is None or not _may_leave(slot, one):
            return Resident(alias, memory_mb, pinned=alias in self._pinned)
        use = self._traffic.look(one.socket)
        unused = use.changed_at_s == 0 and now_s - slot.ready_at_s < ARRIVAL_S
        return Resident(
            alias,
            memory_mb,
            busy=use.active > 0 or unused,
            in_use=use.active > 0,
            pinned=alias in self._pinned,
            fleeting=self.keep_alive_s(alias) >= 0,
            idle_s=max(0.0, now_s - max(use.changed_at_s, slot.ready_at_s)),
            load_s=max(0.001, one.load_ms / 1000),
            served_s=now_s - slot.ready_at_s,
        )

    def _restorable_mb(self, slot: Slot) -> int:
        """Return how much a rollback of the slot's deployment would load again."""
        match slot.state:
            case DeploymentState.LOADING | DeploymentState.EVALUATING if not slot.beside:
                served = slot.serving
            case DeploymentState.SOAKING:
                served = slot.previous
            case _:
                return 0
        if served is None or not slot.wanted:
            return 0
        try:
            return self._estimates.need_mb(served.package, served.variant)
        except GarrisonError:
            return 0

    def _hold(self, aliases: tuple[str, ...]) -> None:
        for one in self._workers.loaded():
            if one.alias in aliases:
                self._traffic.hold(one.socket, HOLD_S)

    def _evict(self, aliases: tuple[str, ...], wanted: set[str]) -> bool:
        """Unload these; False if one of them was asked for in the same moment, and the decision has to be made anew.

        That one goes into ``wanted`` and is not tried again, so decisions come to an end however requests fall.
        """
        for alias in aliases:
            if not self._unload(alias, "evicted"):
                wanted.add(alias)
                return False
        return True

    def _unload(self, alias: str, reason: str) -> bool:
        slots = self._slots()
        for one in self._workers.loaded():
            if one.alias == alias and _may_leave(slots.slots[alias], one) and self._traffic.retire(one.socket):
                try:
                    slots.deliver(alias, UnloadWanted(reason))
                except GarrisonError:  # the store did not take the decision: it serves on
                    self._traffic.readmit(one.socket)
                    raise
                self.left(alias)
                return True
        return False


def _in_use(residents: list[Resident], aliases: set[str]) -> list[Resident]:
    return [replace(one, busy=True) if one.alias in aliases else one for one in residents]


def _may_leave(slot: Slot, one: Loaded) -> bool:
    serving = slot.serving
    serves = serving is not None and serving.package == one.package and slot.phase is Phase.READY
    return serves and slot.state not in SWITCHING


def _insufficient(package: PackageRef, shortage: Shortage) -> InsufficientError:
    hint = "unload another model first: garrison-agent model unload NAME; pinned ones are named in agent.toml"
    if shortage.hopeless:
        hint = "choose a smaller build of it, or lower runtime.context_length; limits.memory_budget_mb is the budget"
    return InsufficientError(
        "memory.insufficient" if shortage.hopeless else "memory.busy",
        f"{package.id} {shortage.message}",
        hint=hint,
        retryable=shortage.passing,
        needed_mb=shortage.needed_mb,
        budget_mb=shortage.budget_mb,
        missing_mb=shortage.missing_mb,
    )
