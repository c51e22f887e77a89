"""Answers to the local API's commands. Loading and unloading answer when the worker is there, or gone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from garrison_agent.api.commands import (
    AddApp,
    BeginImport,
    CheckCache,
    Doctor,
    GetExport,
    GetMetrics,
    GetStatus,
    GetVariants,
    ListApps,
    ListCache,
    ListLoaded,
    ListModels,
    LoadModel,
    LoadResult,
    RecordRequest,
    RemoveApp,
    RemoveFromCache,
    RemoveResult,
    RunningView,
    SetKeepAlive,
    ShowApp,
    UnloadModel,
    UnloadResult,
    unknown_model,
)
from garrison_agent.api.errors import lease_expired
from garrison_agent.core.deployment import SWITCHING
from garrison_agent.core.slot import LoadWanted, Phase, Slot, UnloadWanted
from garrison_agent.events import Asked
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.applications import Applications
from garrison_agent.owner.bundle_export import BundleExport
from garrison_agent.owner.bundle_import import BundleImport
from garrison_agent.owner.cache_checks import CacheChecks
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.residency import Residency
from garrison_agent.owner.shelf import Package, Shelf
from garrison_agent.owner.telemetry import Telemetry
from garrison_agent.owner.views import Views
from garrison_agent.owner.workers import Workers
from garrison_protocol.errors import (
    ConflictError,
    GarrisonError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from garrison_protocol.manifest import PackageRef
from garrison_protocol.states import DeploymentState, Stream

MAX_WAITERS = 1000


@dataclass(frozen=True)
class _Waiter:
    answer: Future[object]
    alias: str
    package: PackageRef
    load: bool
    turn: int
    """The slot's turn when the wish was delivered: a failure of before is not this one's."""
    leaving: frozenset[int] = frozenset()
    """The processes that an unload ends; the next request may have the model loaded again before they are gone."""


class Commands:
    """Owner thread only. ``settle`` looks at those who wait; call it after every event."""

    def __init__(
        self,
        *,
        deployments: Deployments,
        workers: Workers,
        shelf: Shelf,
        journal: Journal,
        views: Views,
        imports: BundleImport,
        exports: BundleExport,
        cache_checks: CacheChecks,
        applications: Applications,
        telemetry: Telemetry,
        residency: Residency,
    ) -> None:
        self._deployments = deployments
        self._workers = workers
        self._shelf = shelf
        self._journal = journal
        self._views = views
        self._imports = imports
        self._exports = exports
        self._cache_checks = cache_checks
        self._applications = applications
        self._telemetry = telemetry
        self._residency = residency
        self._waiters: list[_Waiter] = []

    def handle(self, asked: Asked) -> None:
        """Answer one command, now or later."""
        if not asked.answer.set_running_or_notify_cancel():
            return
        try:
            match asked.command:
                case GetStatus():
                    asked.answer.set_result(self._views.status())
                case ListModels():
                    asked.answer.set_result(self._views.models())
                case GetVariants(name):
                    asked.answer.set_result(self._views.variants(name))
                case CheckCache(name=package, repair=repair):
                    asked.answer.set_result(self._cache_checks.begin(package, repair=repair))
                case ListCache():
                    asked.answer.set_result(self._views.cache())
                case Doctor():
                    asked.answer.set_result(self._views.doctor())
                case RemoveFromCache(name):
                    asked.answer.set_result(self._remove(name))
                case ListLoaded():
                    asked.answer.set_result(self._running())
                case LoadModel() as wanted:
                    self._load(wanted, asked.answer)
                case SetKeepAlive(name, keep_alive_s):
                    self._residency.set_keep_alive(self._slot(name).alias, keep_alive_s)
                    asked.answer.set_result(None)
                case UnloadModel(name):
                    self._unload(name, asked.answer)
                case RecordRequest(alias, model, record):
                    self._applications.request_done(record)
                    self._telemetry.request_done(alias, model, record)
                    asked.answer.set_result(None)
                case AddApp() as wanted:
                    asked.answer.set_result(self._applications.add(wanted))
                case RemoveApp(name):
                    asked.answer.set_result(self._applications.remove(name))
                case ListApps():
                    asked.answer.set_result(self._applications.views())
                case ShowApp(name):
                    asked.answer.set_result(self._applications.show(name))
                case GetMetrics():
                    from garrison_agent.owner.metrics import measured

                    found = measured(self._telemetry, self._deployments, self._workers, self._journal)
                    asked.answer.set_result(found)
                case BeginImport():
                    asked.answer.set_result(self._imports.begin())
                case GetExport(cursor):
                    asked.answer.set_result(self._exports.page(cursor))
        except GarrisonError as error:
            asked.answer.set_exception(error)

    def settle(self) -> None:
        """Answer those whose model is loaded, unloaded, or has failed by now."""
        if self._waiters:
            self._waiters = [waiter for waiter in self._waiters if not self._settled(waiter)]

    def stop(self) -> None:
        """Send everybody away who still waits."""
        for waiter in self._waiters:
            waiter.answer.set_exception(
                UnavailableError("agent.stopping", "the agent is stopping", hint="retry in a moment", retryable=True)
            )
        self._waiters = []

    def _load(self, wanted: LoadModel, answer: Future[object]) -> None:
        slot = self._slot(wanted.name)
        serving = slot.serving
        if serving is None:
            raise ConflictError(
                "model.not_installed",
                f"{slot.alias} is {slot.state.value} and has nothing to load yet",
                hint="follow it with: garrison-agent status",
            )
        if slot.phase is Phase.READY:
            self._keep(slot, wanted.keep_alive_s)
            answer.set_result(LoadResult(id=serving.package.id, alias=slot.alias, outcome="already_loaded"))
            return
        if slot.barred:
            raise lease_expired(serving.package.id)
        if len(self._waiters) >= MAX_WAITERS:  # callers give up long before a switch ends, and ask again
            raise UnavailableError("agent.busy", "too many wait for models already", retryable=True)
        if slot.phase in (Phase.OFF, Phase.BACKOFF, Phase.FAILED) and slot.state not in SWITCHING:
            self._residency.make_room(slot, serving.package, serving.variant, waits=wanted.waits)
        self._keep(slot, wanted.keep_alive_s)
        if slot.phase is Phase.OFF and slot.state not in SWITCHING:
            self._journal.append(Stream.AUDIT, "api.load", {"alias": slot.alias, "model": serving.package.id})
        self._deployments.deliver(slot.alias, LoadWanted())
        turn = self._deployments.slots[slot.alias].turn
        self._waiters.append(_Waiter(answer, slot.alias, serving.package, load=True, turn=turn))

    def _unload(self, name: str, answer: Future[object]) -> None:
        slot = self._slot(name)
        if slot.state in SWITCHING:
            raise ConflictError(
                "model.busy",
                f"{slot.alias} is {slot.state.value}; its models come and go by themselves now",
                hint="wait until the deployment has ended: garrison-agent status",
            )
        package = slot.package if slot.serving is None else slot.serving.package
        leaving = self._workers.generations(slot.alias, package)
        if slot.serving is not None and slot.phase is not Phase.OFF:
            self._journal.append(Stream.AUDIT, "api.unload", {"alias": slot.alias, "model": package.id})
            self._deployments.deliver(slot.alias, UnloadWanted())
            self._residency.left(slot.alias)
        elif not leaving:
            answer.set_result(UnloadResult(id=package.id, alias=slot.alias, outcome="not_loaded"))
            return
        turn = self._deployments.slots[slot.alias].turn
        self._waiters.append(_Waiter(answer, slot.alias, package, load=False, turn=turn, leaving=leaving))

    def _settled(self, waiter: _Waiter) -> bool:
        slot = self._deployments.slots[waiter.alias]
        model = waiter.package.id
        if not waiter.load:
            if not self._workers.ended(waiter.leaving):
                return False
            waiter.answer.set_result(UnloadResult(id=model, alias=waiter.alias, outcome="unloaded"))
            return True
        if slot.serving is None:
            waiter.answer.set_exception(NotFoundError("model.unknown", f"{waiter.alias} was removed meanwhile"))
            return True
        if slot.phase is Phase.READY:
            waiter.answer.set_result(LoadResult(id=slot.serving.package.id, alias=slot.alias, outcome="loaded"))
            return True
        error = _load_failure(slot, waiter)
        if error is None:
            return False
        waiter.answer.set_exception(error)
        return True

    def _keep(self, slot: Slot, keep_alive_s: float | None) -> None:
        if keep_alive_s is not None:
            self._residency.set_keep_alive(slot.alias, keep_alive_s)

    def _running(self) -> list[RunningView]:
        speeds = self._telemetry.speeds
        return [RunningView(**view, tokens_per_s=speeds.get(view["alias"])) for view in self._residency.views()]

    def _slot(self, name: str) -> Slot:
        slots = [slot for slot in self._deployments.slots.values() if slot.state is not DeploymentState.REMOVED]
        names: tuple[Callable[[Slot], str], ...] = (
            lambda slot: slot.alias,
            lambda slot: (slot.serving or slot).package.id,
            lambda slot: (slot.serving or slot).package.name,
        )
        for name_of in names:
            for slot in slots:
                if name_of(slot) == name:
                    return slot
        raise unknown_model(name, [known for slot in slots for known in (slot.alias, slot.package.id)])

    def _remove(self, name: str) -> RemoveResult:
        package = self._package(name)
        used = self._deployments.used()
        if any(ref == package.ref for ref, _ in used):
            raise ConflictError(
                "cache.in_use",
                f"{package.ref.id} serves, is being installed, or is kept for a rollback",
                hint="let a rollout replace it first",
            )
        installed = self._shelf.installed(used)
        shared = {digest for blob in installed if blob.package != package.ref.id for digest in blob.digests}
        own = {
            digest: size
            for blob in installed
            if blob.package == package.ref.id
            for digest, size in blob.digests.items()
            if digest not in shared
        }
        freed_bytes = sum(own.values())
        self._journal.append(Stream.AUDIT, "api.remove", {"model": package.ref.id, "freed_bytes": freed_bytes})
        self._shelf.remove(package.ref.id, own)
        return RemoveResult(id=package.ref.id, freed_bytes=freed_bytes)

    def _package(self, name: str) -> Package:
        packages = self._shelf.packages()
        found = [package for package in packages if name in (package.ref.id, package.ref.name)]
        if not found:
            raise unknown_model(name, [package.ref.id for package in packages])
        if len(found) > 1:
            raise InvalidError(
                "cache.ambiguous",
                f"{name} is here in several versions",
                hint=f"name one: {', '.join(package.ref.id for package in found)}",
            )
        return found[0]


def _load_failure(slot: Slot, waiter: _Waiter) -> GarrisonError | None:
    """Return why a load that was waited for did not come about, or None while it still may."""
    if slot.barred:
        return lease_expired(waiter.package.id)
    match slot.phase:
        case Phase.REPAIRING:
            return UnavailableError(
                "model.repairing",
                f"files of {waiter.package.id} were found damaged and are being repaired",
                hint="retry later; garrison-agent status shows how it goes",
                retryable=True,
            )
        case Phase.BACKOFF | Phase.FAILED if slot.turn != waiter.turn:
            why = f": {slot.failure.message}" if slot.failure is not None else ""
            return UnavailableError(
                "model.load_failed",
                f"the worker of {waiter.package.id} failed{why}; the agent starts it again",
                hint="retry later; the agent's log and garrison-agent status say why",
                retryable=True,
            )
        case Phase.OFF if slot.state not in SWITCHING and slot.turn != waiter.turn:
            return ConflictError("model.unloaded", f"{waiter.package.id} was unloaded meanwhile")
    return None
