"""Runs the effects that the machine asks for. Repeating one after a crash is safe."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from garrison_agent.core import slot as core
from garrison_agent.core.residency import Placement
from garrison_agent.core.retry import jittered
from garrison_agent.core.slot import Effect, Slot
from garrison_agent.events import Post, SlotEvent
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.jobs import IsCancelled, Jobs, Kind, Report, Work, failure
from garrison_agent.owner.residency import Residency
from garrison_agent.owner.shelf import Shelf
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.trust import Trust
from garrison_agent.owner.workers import Workers
from garrison_agent.registry.budget import Evict, Refuse, plan_space
from garrison_agent.registry.selection import Rejected, choose_variant
from garrison_protocol.errors import GarrisonError, InsufficientError
from garrison_protocol.manifest import PackageRef, Variant
from garrison_protocol.messages.report import Inventory
from garrison_protocol.states import Stream, WaitReason


class Uses(Protocol):
    """Who knows what must stay on the disk."""

    def used(self) -> set[tuple[PackageRef, str]]:
        """Return the packages and variants that must stay."""
        ...


class Effects:
    """From an effect to a worker, a job, a timer, or a question to the registry. Owner thread only."""

    def __init__(
        self,
        *,
        workers: Workers,
        residency: Residency,
        jobs: Jobs,
        work: Work,
        trust: Trust,
        shelf: Shelf,
        journal: Journal,
        timers: Timers,
        post: Post,
        inventory: Callable[[], Inventory],
        disk_reserve_bytes: int,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._workers = workers
        self._residency = residency
        self._jobs = jobs
        self._work = work
        self._trust = trust
        self._shelf = shelf
        self._journal = journal
        self._timers = timers
        self._post = post
        self._inventory = inventory
        self._disk_reserve_bytes = disk_reserve_bytes
        self._chance = chance
        self._fetching: dict[tuple[str, int], Variant] = {}
        """Downloads under way, by alias and attempt: the disk that they still need is taken already."""

    def run(self, slot: Slot, effect: Effect, uses: Uses) -> None:
        """Begin ``effect`` of a slot that is saved. What comes of it is posted."""
        alias = slot.alias
        match effect:
            case core.Resolve(attempt, package):
                self._trust.resolve(alias, attempt, package)
            case core.Download():
                self._try(alias, effect.attempt, lambda: self._download(alias, effect, uses))
            case core.VerifyFiles():
                self._try(alias, effect.attempt, lambda: self._verify(alias, effect))
            case core.Place():
                self._try(alias, effect.attempt, lambda: self._place(alias, effect))
            case core.Evaluate():
                self._try(alias, effect.attempt, lambda: self._evaluate(alias, effect))
            case core.StartWorker(package, variant, urgent):
                self._start(slot, package, variant, urgent=urgent)
            case core.StopWorker(package, drain):
                self._workers.stop(alias, package, drain=drain)
            case core.CancelJobs():
                self._residency.release(alias)
                self._jobs.cancel(alias, Kind.DEPLOY)
            case core.Repair():
                self._repair(alias, effect)
            case core.SetTimer(step, delay_s, jitter):
                delay_s = jittered(delay_s, self._chance()) if jitter else delay_s
                self._timers.after(delay_s, SlotEvent(alias, core.TimerDue(step)))
            case core.SetRestart(turn, delay_s):
                self._timers.after(delay_s, SlotEvent(alias, core.RestartDue(turn)))
            case core.Proceed(step):
                self._post(SlotEvent(alias, core.Proceeded(step)))

    def admitted(self, attempt: int, package: PackageRef, manifest_bytes: bytes) -> core.Event:
        """Keep the manifest of a package that may be installed, and choose the variant that fits this board."""
        manifest = self._shelf.keep(package, manifest_bytes)
        chosen = choose_variant(manifest, self._inventory(), self._residency.budget_mb)
        if isinstance(chosen, Rejected):
            return core.Unsuitable(attempt, "requirements.not_met", chosen.message)
        return core.Resolved(attempt, chosen.name, chosen.size_bytes)

    def _start(self, slot: Slot, package: PackageRef, variant: str, *, urgent: bool) -> None:
        """Start a worker. A candidate has its room already; for what serves it is made now, or it has to wait."""
        self._residency.release(slot.alias)
        if slot.serving is not None and slot.serving.package == package:
            try:
                self._residency.make_room(slot, package, variant)
            except InsufficientError as error:
                self._post(SlotEvent(slot.alias, core.WorkerFailed(package, error.code, error.message)))
                return
            except GarrisonError:
                pass  # what is wrong on the disk is found, and said, when it is launched
        self._shelf.used(package)
        self._workers.start(slot.alias, package, variant, urgent=urgent)

    def _try(self, alias: str, attempt: int, begin: Callable[[], None]) -> None:
        try:
            begin()
        except GarrisonError as error:
            self._post(SlotEvent(alias, failure(attempt, error)))

    def _download(self, alias: str, effect: core.Download, uses: Uses) -> None:
        manifest, variant = self._shelf.variant(effect.package, effect.variant)
        missing_bytes = self._make_room(alias, variant, uses)
        if missing_bytes:
            message = f"{effect.package.id} needs {missing_bytes} more bytes of disk than can be freed"
            waits = core.MustWait(effect.attempt, WaitReason.DISK, "disk.insufficient", message)
            self._post(SlotEvent(alias, waits))
            return
        work, fetching = self._work, self._fetching
        fetching[alias, effect.attempt] = variant

        def job(report: Report, cancelled: IsCancelled) -> core.Event:
            try:
                work.download(manifest, variant, report, cancelled)
            finally:
                fetching.pop((alias, effect.attempt), None)
            return core.Downloaded(effect.attempt)

        self._jobs.run(alias, Kind.DEPLOY, job, lambda error: failure(effect.attempt, error))

    def _make_room(self, alias: str, variant: Variant, uses: Uses) -> int:
        """Remove what nobody needs until the variant fits; return how many bytes are missing still."""
        shelf = self._shelf
        needed = shelf.missing_bytes(variant, *list(self._fetching.values()))
        if needed + self._disk_reserve_bytes > shelf.blobs.free_bytes():
            used = uses.used()
            shelf.drop_partials({file.sha256 for one in self._variants(used) for file in one.files})
            plan = plan_space(needed, shelf.blobs.free_bytes(), self._disk_reserve_bytes, shelf.installed(used))
            if isinstance(plan, Refuse):
                return plan.missing_bytes
            if isinstance(plan, Evict):
                names = ",".join(sorted(package.package for package in plan.packages))
                facts: dict[str, str | int | bool | None] = {
                    "alias": alias,
                    "models": names[:1000],
                    "freed_bytes": plan.freed_bytes,
                }
                self._journal.append(Stream.AUDIT, "disk.evicted", facts)
                for index, package in enumerate(plan.packages):
                    shelf.remove(package.package, plan.digests if index == 0 else ())
        return 0

    def _variants(self, used: set[tuple[PackageRef, str]]) -> list[Variant]:
        found = []
        for package, name in used:
            try:
                found.append(self._shelf.variant(package, name)[1])
            except GarrisonError:
                continue  # nothing of it is known, so nothing of it can be protected
        return found

    def _verify(self, alias: str, effect: core.VerifyFiles) -> None:
        _, variant = self._shelf.variant(effect.package, effect.variant)
        work = self._work

        def job(_report: Report, cancelled: IsCancelled) -> core.Event:
            work.verify(variant, cancelled)
            return core.FilesVerified(effect.attempt)

        self._jobs.run(alias, Kind.DEPLOY, job, lambda error: failure(effect.attempt, error))

    def _place(self, alias: str, effect: core.Place) -> None:
        placement, needed = self._residency.place(alias, effect.package, effect.variant)
        budget = self._residency.budget_mb
        event: core.Event
        match placement:
            case Placement.BESIDE:
                event = core.Placed(effect.attempt, beside=True)
            case Placement.INSTEAD:
                event = core.Placed(effect.attempt, beside=False)
            case Placement.BUSY:
                message = f"{effect.package.id} needs {needed} MiB; other models hold the budget of {budget} MiB"
                event = core.MustWait(effect.attempt, WaitReason.BUSY, "memory.busy", message)
            case Placement.NEVER:
                message = f"{effect.package.id} needs {needed} MiB, the budget is {budget} MiB"
                event = core.Unsuitable(effect.attempt, "requirements.not_met", message)
        self._post(SlotEvent(alias, event))

    def _evaluate(self, alias: str, effect: core.Evaluate) -> None:
        manifest, _ = self._shelf.variant(effect.package, effect.variant)
        socket = self._workers.socket(alias, effect.package)
        if socket is None:
            return  # its worker just ended, which the slot will hear next
        rss_mb = self._workers.rss_mb(alias, effect.package)
        work = self._work

        def job(_report: Report, cancelled: IsCancelled) -> core.Event:
            summary, code, message = work.evaluate(
                socket, manifest.id, manifest.evaluation, effect.limits, rss_mb=rss_mb, cancelled=cancelled
            )
            return core.Evaluated(effect.attempt, summary, code, message)

        self._jobs.run(alias, Kind.DEPLOY, job, lambda error: core.JobFailed(effect.attempt, error.code, error.message))

    def _repair(self, alias: str, effect: core.Repair) -> None:
        work = self._work

        def job(report: Report, cancelled: IsCancelled) -> core.Event:
            return core.Repaired(effect.turn, work.repair(effect.package, effect.variant, report, cancelled))

        self._jobs.run(alias, Kind.REPAIR, job, lambda error: core.RepairFailed(effect.turn, error.code, error.message))
