"""What the local API shows of the agent: JSON-able views for people and programs on the board."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from garrison_agent.api.commands import (
    AliasStatus,
    CacheEntry,
    CacheStatus,
    CacheView,
    Check,
    DesiredStatus,
    ModelView,
    RegistryStatus,
    StatusView,
    StreamStatus,
    VariantsView,
    VariantView,
    model_view,
    unknown_model,
)
from garrison_agent.api.trust_view import trust_checks, trust_view
from garrison_agent.core.desired import Applied
from garrison_agent.core.slot import Phase, Slot
from garrison_agent.core.trust_report import TrustFacts
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.anchor import Anchors
from garrison_agent.owner.certificate import Certificate
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.shelf import Shelf
from garrison_agent.owner.telemetry import Telemetry
from garrison_agent.owner.timekeeper import Timekeeper
from garrison_agent.owner.trust import Trust
from garrison_agent.owner.uplink import AGENT_VERSION
from garrison_agent.owner.workers import Workers
from garrison_agent.registry.selection import explain_variants
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import Manifest, PackageRef, Variant
from garrison_protocol.messages.report import Inventory, RegistryView
from garrison_protocol.states import DeploymentState, Engine, Freshness

_MIB = 1024 * 1024
_ENDED_BADLY = (DeploymentState.FAILED, DeploymentState.REJECTED, DeploymentState.ROLLED_BACK, DeploymentState.DOWN)


def registry_view(trust: Trust, deployments: Deployments) -> RegistryView:
    """Return what status messages say of the registry; a lease that has run out says more than its freshness."""
    ended = deployments.lease_ended
    return trust.view.model_copy(update={"freshness": Freshness.LEASE_EXPIRED}) if ended else trust.view


class Views:
    """Reads everything, changes nothing. Owner thread only."""

    def __init__(
        self,
        *,
        device: str,
        broker: Callable[[], str],
        certificate: Certificate,
        started_at: int,
        deployments: Deployments,
        workers: Workers,
        shelf: Shelf,
        journal: Journal,
        trust: Trust,
        timekeeper: Timekeeper,
        anchors: Anchors,
        telemetry: Telemetry,
        applied: Callable[[], Applied],
        held: Callable[[], int | None],
        refused: Callable[[], dict[str, int]],
        online: Callable[[], bool],
        offline_because: Callable[[], str],
        disk_reserve_bytes: int,
        inventory: Callable[[], Inventory],
        memory_budget_mb: int,
    ) -> None:
        self._device = device
        self._broker = broker
        self._certificate = certificate
        self._started_at = started_at
        self._deployments = deployments
        self._workers = workers
        self._shelf = shelf
        self._journal = journal
        self._trust = trust
        self._timekeeper = timekeeper
        self._anchors = anchors
        self._held = held
        self._telemetry = telemetry
        self._applied = applied
        self._refused = refused
        self._online = online
        self._offline_because = offline_because
        self._disk_reserve_bytes = disk_reserve_bytes
        self._inventory = inventory
        self._memory_budget_mb = memory_budget_mb

    def status(self) -> StatusView:
        """Return everything ``garrison-agent status`` shows."""
        registry, applied = registry_view(self._trust, self._deployments), self._applied()
        pending = self._journal.pending()
        return StatusView(
            device=self._device,
            version=AGENT_VERSION,
            started_at=self._started_at,
            pid=os.getpid(),
            connected=self._online(),
            broker=self._broker(),
            broker_error=self._why_offline(),
            certificate=self._certificate.status(),
            registry=RegistryStatus(
                freshness=registry.freshness.value,
                root=registry.root,
                timestamp=registry.timestamp,
                snapshot=registry.snapshot,
                targets=registry.targets,
            ),
            trust=trust_view(self._facts()),
            desired=DesiredStatus(counter=applied.counter, sha256=applied.sha256),
            aliases=[self._alias(slot) for slot in self._deployments.slots.values()],
            outbox={
                name: StreamStatus(epoch=head.epoch, last=head.seq, acked=head.acked, pending=pending.get(name, 0))
                for name, head in self._journal.heads().items()
            },
            health={**self._telemetry.latest, **self._telemetry.measure()},
            refused=dict(self._refused()),
            cache=self._cache_status(),
        )

    def models(self) -> list[ModelView]:
        """Return every package that is desired, serving, or installed."""
        views: dict[PackageRef, ModelView] = {}
        for slot in self._deployments.slots.values():
            if slot.state is DeploymentState.REMOVED:
                continue
            serving = slot.serving
            if serving is not None:
                state = slot.state.value if serving.package == slot.package else "INSTALLED"
                loaded = slot.phase is Phase.READY
                self._add(views, slot.alias, serving.package, serving.variant, state, serving=True, loaded=loaded)
            if slot.variant is not None and slot.package not in views:
                loaded = self._workers.socket(slot.alias, slot.package) is not None
                self._add(views, slot.alias, slot.package, slot.variant, slot.state.value, serving=False, loaded=loaded)
        for package in self._shelf.packages():
            if package.variants and package.ref not in views:
                views[package.ref] = model_view(
                    package.manifest,
                    package.variants[0],
                    alias=package.manifest.alias,
                    manifest_sha256=package.ref.manifest_sha256,
                    state="INSTALLED",
                    serving=False,
                    loaded=False,
                )
        return list(views.values())

    def variants(self, name: str) -> VariantsView:
        """Return every build of the package called ``name``, and whether it fits this board.

        Raises:
            NotFoundError: ``model.unknown``.
        """
        alias, manifest = self._manifest(name)
        board, builds = self._inventory(), {variant.name: variant for variant in manifest.variants}
        return VariantsView(
            id=manifest.id,
            alias=alias,
            architecture=board.architecture,
            cpu_features=list(board.cpu_features),
            engines=list(board.engines),
            memory_mb=board.memory_mb,
            memory_budget_mb=self._memory_budget_mb,
            disk_free_mb=max(0, self._shelf.blobs.free_bytes() - self._disk_reserve_bytes) // _MIB,
            variants=[
                VariantView(
                    name=fit.name,
                    engine=builds[fit.name].runtime.engine.value,
                    device_type=builds[fit.name].runtime.device_type.value,
                    execution_provider=builds[fit.name].runtime.execution_provider,
                    quantization=builds[fit.name].quantization,
                    memory_mb=fit.memory_mb,
                    size_bytes=fit.size_bytes,
                    missing_bytes=self._shelf.missing_bytes(builds[fit.name]),
                    fits=fit.fits,
                    chosen=fit.chosen,
                    reasons=list(fit.reasons),
                )
                for fit in explain_variants(manifest, board, self._memory_budget_mb)
            ],
        )

    def _manifest(self, name: str) -> tuple[str, Manifest]:
        """Return alias and manifest of the package called ``name``; one that was rejected here has them too."""
        found: list[tuple[str, Manifest]] = []
        for slot in self._deployments.slots.values():
            for ref in (slot.package, *([slot.serving.package] if slot.serving is not None else [])):
                with contextlib.suppress(GarrisonError):  # its manifest is not here, or being repaired
                    found.append((slot.alias, self._shelf.manifest(ref)))
        found += [(package.manifest.alias, package.manifest) for package in self._shelf.packages()]
        for alias, manifest in found:
            if name == alias:
                return alias, manifest
        for alias, manifest in found:
            if name in (manifest.id, manifest.name):
                return alias, manifest
        raise unknown_model(name, [known for alias, manifest in found for known in (alias, manifest.id)])

    def cache(self) -> CacheView:
        """Return what the model store holds."""
        status = self._cache_status()
        return CacheView(
            location=str(self._shelf.root),
            used_mb=status["used_mb"],
            free_mb=status["free_mb"],
            entries=[
                self._entry(package.ref, variant, str(package.folder))
                for package in self._shelf.packages()
                for variant in package.variants
            ],
        )

    def doctor(self) -> list[Check]:
        """Return what only the running agent knows of its health."""
        mine = [self._check_broker(), self._certificate.check(), self._check_registry(), self._check_disk()]
        return [*mine, *self._check_models(), *trust_checks(trust_view(self._facts()))]

    def _facts(self) -> TrustFacts:
        trust, keeper, now_s = self._trust, self._timekeeper, self._timekeeper.now_s()
        slots = self._deployments.slots
        return TrustFacts(
            freshness=trust.view.freshness,
            root=trust.view.root,
            fresh_at_s=trust.fresh_at_s,
            ends=trust.expires,
            fleet=trust.fleet,
            clock_s=keeper.clock_s,
            floor_s=keeper.floor_s(),
            signer=keeper.source,
            anchored=keeper.anchored_at is not None,
            applied=self._applied().counter,
            lowest=self._anchors.lowest_counter,
            held=self._held(),
            leases={
                alias: (serving.package.id, standing)
                for alias, standing in self._deployments.leases(fresh_at_s=trust.fresh_at_s, now_s=now_s).items()
                if (serving := slots[alias].serving) is not None
            },
        )

    def _alias(self, slot: Slot) -> AliasStatus:
        serving = slot.serving
        done, total = self._deployments.progress(slot)
        here = [one for one in self._workers.loaded() if serving is not None and one.package == serving.package]
        loaded = next((one for one in here if one.alias == slot.alias), None)
        return AliasStatus(
            alias=slot.alias,
            package=slot.package.id,
            version=slot.package.version,
            state=slot.state.value,
            loaded=slot.phase is Phase.READY,
            serving=None if serving is None else serving.package.id,
            serving_since=None if loaded is None else int(loaded.ready_at),
            rollout=slot.rollout,
            variant=slot.variant,
            error_code=slot.error_code,
            error_message=slot.error_message,
            progress_bytes=done,
            total_bytes=total,
            endpoint=self._endpoint(slot),
            worker=slot.phase.value,
            worker_failure=None if slot.failure is None else f"{slot.failure.code}: {slot.failure.message}",
            memory_mb=None if loaded is None else loaded.memory_mb,
            load_ms=None if loaded is None else loaded.load_ms,
        )

    def _endpoint(self, slot: Slot) -> str | None:
        if slot.serving is None:
            return None
        found = self._variant(slot.serving.package, slot.serving.variant)
        if found is None:
            return None
        return f"/v2/models/{slot.alias}" if found[1].runtime.engine is Engine.ONNXRUNTIME else "/v1"

    def _variant(self, package: PackageRef, name: str) -> tuple[Manifest, Variant] | None:
        try:
            return self._shelf.variant(package, name)
        except GarrisonError:
            return None  # being repaired

    def _add(
        self,
        views: dict[PackageRef, ModelView],
        alias: str,
        package: PackageRef,
        variant_name: str,
        state: str,
        *,
        serving: bool,
        loaded: bool,
    ) -> None:
        found = self._variant(package, variant_name)
        if found is not None:
            views[package] = model_view(
                *found,
                alias=alias,
                manifest_sha256=package.manifest_sha256,
                state=state,
                serving=serving,
                loaded=loaded,
            )

    def _entry(self, package: PackageRef, variant: Variant, path: str) -> CacheEntry:
        state = "unused"
        for slot in self._deployments.slots.values():
            if slot.serving is not None and (slot.serving.package, slot.serving.variant) == (package, variant.name):
                state = "loaded" if slot.phase is Phase.READY else "serving"
                break
            if slot.previous is not None and slot.previous.package == package:
                state = "previous"
            elif (package, variant.name) in slot.uses():
                state = "installing"
        return CacheEntry(
            id=package.id,
            variant=variant.name,
            size_bytes=variant.size_bytes,
            state=state,
            in_use=any(package == used for used, _ in self._deployments.used()),
            path=path,
        )

    def _cache_status(self) -> CacheStatus:
        blobs = self._shelf.blobs
        return CacheStatus(used_mb=blobs.usage() // _MIB, free_mb=blobs.free_bytes() // _MIB)

    def _why_offline(self) -> str:
        return self._offline_because().removeprefix(f"broker {self._broker()}: ")

    def _check_broker(self) -> Check:
        if self._online():
            return Check(name="broker", outcome="ok", detail=f"connected to {self._broker()}", fix="")
        why = self._why_offline()
        return Check(
            name="broker",
            outcome="warn",
            detail=f"not connected to {self._broker()}{f' ({why})' if why else ''}; models serve, records wait",
            fix="check the network and the broker; ask an operator whether the board was revoked: garrison device list",
        )

    def _check_registry(self) -> Check:
        freshness, error = self._trust.view.freshness, self._trust.last_error
        if freshness is Freshness.FRESH:
            return Check(name="registry", outcome="ok", detail="metadata is fresh", fix="")
        detail = f"metadata is {freshness.value}" + (f"; the last refresh failed: {error}" if error else "")
        return Check(
            name="registry",
            outcome="warn",
            detail=f"{detail}; models serve, nothing new is installed",
            fix="connect the board to its controller",
        )

    def _check_disk(self) -> Check:
        free, reserve = self._shelf.blobs.free_bytes(), self._disk_reserve_bytes
        detail = f"{free // _MIB} MiB free, {reserve // _MIB} MiB are kept in reserve"
        if free >= reserve:
            return Check(name="disk", outcome="ok", detail=detail, fix="")
        return Check(name="disk", outcome="fail", detail=detail, fix="garrison-agent cache list, then cache remove")

    def _check_models(self) -> list[Check]:
        checks = []
        for slot in self._deployments.slots.values():
            if slot.state is DeploymentState.REMOVED:
                continue
            name = f"model {slot.alias}"
            detail = f"{slot.package.id} is {slot.state.value}"
            if slot.error_code:
                detail += f": {slot.error_code}: {slot.error_message}"
            if slot.state is DeploymentState.DOWN or slot.phase in (Phase.BACKOFF, Phase.REPAIRING, Phase.FAILED):
                fix = "see the agent's log; it tries again by itself"
                if slot.phase is Phase.FAILED:
                    fix = f"find the cause, then: garrison-agent model load {slot.alias}; by itself it tries rarely"
                detail += f"; its worker is {slot.phase}"
                if slot.failure is not None:
                    detail += f" ({slot.failure.code}: {slot.failure.message})"
                checks.append(Check(name=name, outcome="fail", detail=detail, fix=fix))
            elif slot.state in _ENDED_BADLY:
                checks.append(Check(name=name, outcome="warn", detail=detail, fix="create a new rollout"))
            else:
                checks.append(Check(name=name, outcome="ok", detail=detail, fix=""))
        return checks
