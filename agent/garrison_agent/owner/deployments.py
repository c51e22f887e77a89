"""The slots: every event goes through the pure machine, is saved with its audit entries, and only then has effects."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from garrison_agent.adapters.database import Database
from garrison_agent.adapters.slots import SlotStore
from garrison_agent.api.routes import Route, RouteTable
from garrison_agent.core.deployment import advance, new_slot, resume
from garrison_agent.core.desired import reconcile
from garrison_agent.core.lease import Standing, changes
from garrison_agent.core.slot import Assign, Event, Now, Nudged, Phase, Served, Slot, Step
from garrison_agent.events import Progress, Tick
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.effects import Effects
from garrison_agent.owner.shelf import Shelf
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.workers import Workers
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import Lease, PackageRef
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.report import AliasReport
from garrison_protocol.states import DeploymentState, Stream

SOAK_TICK_S = 5.0

_log = logging.getLogger(__name__)


class Deployments:
    """Holds the slots. Owner thread only; ``on_change`` is called after a change is saved, before its effects."""

    def __init__(
        self,
        *,
        database: Database,
        store: SlotStore,
        journal: Journal,
        effects: Effects,
        workers: Workers,
        shelf: Shelf,
        timers: Timers,
        now: Callable[[], Now],
        on_change: Callable[[], None],
    ) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._effects = effects
        self._workers = workers
        self._shelf = shelf
        self._timers = timers
        self._now = now
        self._on_change = on_change
        self._slots: dict[str, Slot] = store.load()
        self._progress: dict[str, tuple[int, int]] = {}
        self._soaked_until: dict[str, float] = {}
        self._soak_due = False

    @property
    def slots(self) -> Mapping[str, Slot]:
        """Every alias this board has or had."""
        return self._slots

    def used(self) -> set[tuple[PackageRef, str]]:
        """Return the packages and variants that must stay on the disk."""
        return {use for slot in self._slots.values() for use in slot.uses()}

    def resume(self) -> None:
        """Take up every saved slot after a start of the agent. Needs no network."""
        # A candidate asks for memory only after everything that was loaded before has taken its own again.
        for alias, slot in sorted(self._slots.items(), key=lambda item: item[1].state is DeploymentState.STAGED):
            self._commit({alias: resume(slot)})

    def deliver(self, alias: str, event: Event) -> None:
        """Apply one event to one alias; one of an alias that is not here is of the past.

        Raises:
            UnexpectedEventError: The machine has no row for it; a bug, which must end the process.
        """
        slot = self._slots.get(alias)
        if slot is not None:
            self._commit({alias: advance(slot, event, self._now())})

    def apply(self, desired: Desired, also: Callable[[], None]) -> None:
        """Apply an accepted desired state: all slots change in one transaction with what ``also`` writes."""
        now = self._now()
        steps: dict[str, Step] = {}
        for alias, event in reconcile(self._slots, desired).items():
            slot = self._slots.get(alias)
            if slot is None and isinstance(event, Assign):
                slot = new_slot(event.entry)
            if slot is not None:
                steps[alias] = advance(slot, event, now)
        self._commit(steps, also)

    def nudge(self) -> None:
        """Let deployments that wait for network or metadata try at once."""
        for alias, slot in list(self._slots.items()):
            if slot.state is DeploymentState.WAITING:
                self.deliver(alias, Nudged())

    def judge_leases(self, *, fresh_at_s: float, now_s: float) -> None:
        """Act on leases that have run out by ``now_s`` since fresh metadata was last verified, or count anew since."""
        for alias, event in changes(self._slots, self._leases(), fresh_at_s=fresh_at_s, now_s=now_s).items():
            self.deliver(alias, event)

    def leases(self, *, fresh_at_s: float, now_s: float) -> dict[str, Standing]:
        """Return how the lease of each serving model stands that has one, by alias."""
        return {
            alias: Standing(lease, fresh_at_s, now_s) for alias, lease in self._leases().items() if lease is not None
        }

    @property
    def lease_ended(self) -> bool:
        """Whether the lease of any serving model has run out."""
        return any(slot.lease_ended for slot in self._slots.values())

    def _leases(self) -> dict[str, Lease | None]:
        found = {}
        for slot in self._slots.values():
            if slot.serving is not None:
                try:
                    found[slot.alias] = self._shelf.manifest(slot.serving.package).lease
                except GarrisonError:
                    continue  # being repaired; what is known of its lease stays
        return found

    def progressed(self, progress: Progress) -> None:
        """Note how far a download is."""
        if progress.alias in self._slots:
            self._progress[progress.alias] = (progress.done, progress.total)

    def soak(self) -> None:
        """Count time in service of every slot that soaks."""
        self._soak_due = False
        now = self._now()
        for alias, slot in list(self._slots.items()):
            if _soaks(slot):
                since = max(self._soaked_until.get(alias, 0.0), slot.ready_at_s)
                self._soaked_until[alias] = now.monotonic_s
                self.deliver(alias, Served(max(0.0, now.monotonic_s - since)))
        self._set_soak_timer()

    def routes(self) -> RouteTable:
        """Return which worker answers to which name now."""
        routes = []
        for slot in self._slots.values():
            if slot.serving is None:
                continue
            package = slot.serving.package
            try:
                manifest, variant = self._shelf.variant(package, slot.serving.variant)
            except GarrisonError:
                continue  # its manifest is being repaired; the slot's state says so
            socket = self._workers.socket(slot.alias, package) if slot.phase is Phase.READY else None
            routes.append(
                Route(
                    alias=slot.alias,
                    model_id=package.id,
                    engine=variant.runtime.engine,
                    socket=socket,
                    package=package,
                    manifest=manifest,
                    variant=variant,
                    state=slot.state.value,
                    loaded=socket is not None,
                    barred=slot.barred,
                    failure=_why_failed(slot),
                )
            )
        return RouteTable(tuple(routes))

    def reports(self) -> tuple[AliasReport, ...]:
        """Return what the board reports of each alias."""
        return tuple(self._report(slot) for slot in self._slots.values())

    def progress(self, slot: Slot) -> tuple[int, int]:
        """Return bytes done and in total of the slot's package."""
        match slot.state:
            case DeploymentState.ASSIGNED | DeploymentState.WAITING | DeploymentState.DOWNLOADING:
                done, total = self._progress.get(slot.alias, (0, 0))
                return (done, total) if total == slot.total_bytes else (0, slot.total_bytes)
            case DeploymentState.FAILED | DeploymentState.REJECTED | DeploymentState.REMOVED:
                return (0, slot.total_bytes)
        return (slot.total_bytes, slot.total_bytes)

    def _report(self, slot: Slot) -> AliasReport:
        done, total = self.progress(slot)
        return AliasReport(
            alias=slot.alias,
            package=slot.package,
            rollout=slot.rollout,
            state=slot.state,
            step=slot.step,
            variant=slot.variant,
            error_code=slot.error_code,
            error_message=None if slot.error_message is None else slot.error_message[:500],
            progress_bytes=done,
            total_bytes=total,
            serving=None if slot.serving is None else slot.serving.package,
            loaded=slot.phase is Phase.READY,
            lease_expired=slot.lease_ended,
            evaluation=slot.evaluation,
        )

    def _commit(self, steps: dict[str, Step], also: Callable[[], None] | None = None) -> None:
        changed = {alias: step for alias, step in steps.items() if step.records or step.slot != self._slots.get(alias)}
        if changed or also is not None:
            with self._database.transaction():
                if also is not None:
                    also()
                for step in changed.values():
                    self._store.save(step.slot)
                    for record in step.records:
                        self._journal.append(Stream.AUDIT, record.kind, record.facts)
            for alias, step in changed.items():
                self._forget(self._slots.get(alias), step.slot)
                self._slots[alias] = step.slot
                for record in step.records:
                    _log.info("%s %s", record.kind, " ".join(f"{name}={fact}" for name, fact in record.facts.items()))
            self._on_change()
        for step in steps.values():
            for effect in step.effects:
                self._effects.run(step.slot, effect, self)
        self._set_soak_timer()

    def _forget(self, old: Slot | None, new: Slot) -> None:
        if old is None or old.package != new.package:
            self._progress.pop(new.alias, None)
        if new.state is not DeploymentState.SOAKING:
            self._soaked_until.pop(new.alias, None)

    def _set_soak_timer(self) -> None:
        soaking = [slot for slot in self._slots.values() if _soaks(slot)]
        if not soaking or self._soak_due:
            return
        rest = min(slot.desired.soak_s - slot.soaked_s for slot in soaking if slot.desired is not None)
        self._soak_due = True
        self._timers.after(min(SOAK_TICK_S, max(0.0, rest)), Tick.SOAK)


def _why_failed(slot: Slot) -> str | None:
    if slot.phase is not Phase.FAILED:
        return None
    return "its worker failed" if slot.failure is None else slot.failure.message


def _soaks(slot: Slot) -> bool:
    return slot.state is DeploymentState.SOAKING and slot.phase is Phase.READY and slot.desired is not None
