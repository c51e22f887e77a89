"""The owner's ports without a network, threads, or models: a link, worker processes, blocking work, and a clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from garrison_agent.core.certificate import Validity
from garrison_agent.core.slot import Now
from garrison_agent.owner.jobs import IsCancelled, Report
from garrison_agent.owner.shelf import Shelf
from garrison_agent.registry.trust import Refresh
from garrison_agent.runtimes.spec import WorkerSpec
from garrison_agent.runtimes.status import Exited, Failed, Ready, WorkerEvent
from garrison_protocol.errors import GarrisonError, UnavailableError
from garrison_protocol.manifest import Evaluation, Manifest, PackageRef, Variant
from garrison_protocol.messages.desired import GateLimits
from garrison_protocol.messages.enrolment import RenewRequest, RenewResponse
from garrison_protocol.messages.report import EvaluationSummary
from garrison_protocol.states import Freshness
from tests.fakes.packages import Package


class FakeClock:
    """Time that only tests move."""

    def __init__(self) -> None:
        self.wall_s = 1_800_000_000.0
        self.monotonic_s = 5000.0

    def __call__(self) -> Now:
        return Now(self.wall_s, self.monotonic_s)

    def forward(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds


class FakeLink:
    """A broker connection that keeps what it was given, in order."""

    def __init__(self) -> None:
        self.connected = False
        self.last_error: str | None = None
        self.room = 1_000_000
        """How many further messages it takes."""
        self.sent: list[tuple[str, bytes, bool]] = []
        self.started = self.stopped = False
        self.reconnects = 0

    def start(self) -> None:
        self.started = True

    def reconnect(self) -> None:
        self.reconnects += 1

    def stop(self) -> None:
        self.stopped = True
        self.connected = False

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        if not self.connected or self.room <= 0:
            return False
        self.room -= 1
        self.sent.append((topic, payload, retain))
        return True


class FakeRenew:
    """A certificate of so many days, and a controller that gives the next one, or says why not."""

    def __init__(self, now_s: float, days: float = 30) -> None:
        self.days = days
        self.number = 1
        self.validity: Validity | None = Validity(now_s, now_s + days * 86400)
        self.error: GarrisonError | None = None
        self.tries = 0
        self.issuer = "device CA"
        """What the text of its CA would contain."""
        self.now_s = now_s
        """The controller's clock."""

    def read(self, device_cas: str = "") -> tuple[str, Validity] | None:
        if self.validity is None or (device_cas and self.issuer not in device_cas):
            return None
        return f"{self.number:064x}", self.validity

    def renew(self) -> None:
        self.tries += 1
        if self.error is not None:
            raise self.error
        self.number += 1
        self.validity = Validity(self.now_s, self.now_s + self.days * 86400)


class FakeRenewals:
    """A board that asks for a certificate by stick, for a key that never changes."""

    def __init__(self) -> None:
        self.answers: list[RenewResponse] = []
        self.error: GarrisonError | None = None

    def request(self, number: int) -> RenewRequest:
        if self.error is not None:
            raise self.error
        return RenewRequest(device="edge-1", nonce=f"stick:{number}", csr_pem="csr", proof="0" * 128)

    def answered(self, answer: RenewResponse, device_ca: str, at: datetime) -> bool:
        self.answers.append(answer)
        return True


@dataclass
class FakeModels:
    """What worker processes do when they are started: by default they become ready."""

    broken: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Code and message with which a model (``name:version``) fails to load."""
    holding: bool = False
    """Workers say nothing until ``release``."""
    lingering: bool = False
    """Workers that are started from now on do not end when they are asked to."""
    started: list[FakeWorker] = field(default_factory=list)

    def build(self, spec: WorkerSpec, on_event: Callable[[WorkerEvent], None]) -> FakeWorker:
        worker = FakeWorker(spec, on_event, self)
        self.started.append(worker)
        return worker

    @property
    def running(self) -> list[str]:
        """The models in memory, by id."""
        return sorted(worker.spec.model_id for worker in self.started if worker.alive)

    def worker(self, model_id: str) -> FakeWorker:
        """The newest living worker of a model."""
        return next(one for one in reversed(self.started) if one.spec.model_id == model_id and one.alive)

    def release(self) -> None:
        """Let workers that were held become ready."""
        self.holding = False
        for worker in self.started:
            worker.load()


class FakeWorker:
    """A child process in name only; it obeys the rule of one ``Exited`` per ``start``."""

    def __init__(self, spec: WorkerSpec, on_event: Callable[[WorkerEvent], None], models: FakeModels) -> None:
        self.spec = spec
        self.alive = False
        self.peak: int | None = None
        """MiB; None: nobody measured it."""
        self.lingers = models.lingering
        """It does not end when it is asked to."""
        self.grace_s: float | None = None
        """What it was given to end in; None: nobody asked it to."""
        self._loaded = False
        self._on_event = on_event
        self._models = models

    def start(self) -> None:
        self.alive = True
        if not self._models.holding:
            self.load()

    def load(self) -> None:
        if not self.alive or self._loaded:
            return
        self._loaded = True
        failure = self._models.broken.get(self.spec.model_id)
        if failure is not None:
            self._on_event(Failed(*failure))
            self.die(1)
        else:
            self._on_event(Ready(12.0, 100.0))

    def say(self, event: WorkerEvent) -> None:
        self._on_event(event)

    def die(self, returncode: int = -9) -> None:
        if self.alive:
            self.alive = False
            self._on_event(Exited(returncode))

    def stop(self, grace_s: float = 5.0) -> None:
        self.grace_s = grace_s
        if not self.lingers:
            self.die(0)

    def kill(self) -> None:
        self.die(-9)

    def kill_stalled(self, message: str) -> None:
        if self.alive:
            self.alive = False
            self._on_event(Exited(-9, "worker.stalled", message))

    def rss_mb(self) -> float | None:
        return 100.0 if self.alive else None

    def peak_mb(self) -> int | None:
        return self.peak if self.alive else None


class FakeWork:
    """The registry, the network, and the gate as the tests say they are."""

    def __init__(self, shelf: Shelf, fleet: bytes) -> None:
        self._shelf = shelf
        self.fleet: bytes = fleet
        self.published: dict[str, Package] = {}
        self.version = 1
        self.offline_now = False
        self.refreshed_at = 1_800_000_000
        self.refusal: GarrisonError | None = None
        self.verdicts: dict[str, tuple[str, str]] = {}
        """Code and message with which the gate refuses a model (``name:version``)."""
        self.download_error: GarrisonError | None = None
        self.healths: dict[str, Mapping[str, object]] = {}
        """What the workers say of themselves, by the names of their sockets."""
        self.log: list[str] = []

    def publish(self, package: Package) -> None:
        self.published[package.path] = package
        self.version += 1

    def refresh(self, want: list[str], high_water: Mapping[str, int], floor_s: float) -> Refresh:
        self.log.append("refresh")
        self._reach()
        if self.refusal is not None:
            raise self.refusal
        return self._view(want, Freshness.FRESH)

    def offline(self, want: list[str], high_water: Mapping[str, int], trusted_at: int, floor_s: float) -> Refresh:
        self.log.append("offline")
        return self._view([], Freshness.STALE)

    def download(self, manifest: Manifest, variant: Variant, report: Report, cancelled: IsCancelled) -> None:
        self.log.append(f"download {manifest.id}")
        self._reach()
        if self.download_error is not None:
            raise self.download_error
        package = next(one for one in self.published.values() if one.manifest.id == manifest.id)
        for file in variant.files:
            path = self._shelf.blobs.path(file.sha256)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(package.blobs[file.sha256])
        report(variant.size_bytes, variant.size_bytes)

    def verify(self, variant: Variant, cancelled: IsCancelled) -> None:
        self.log.append("verify")

    def evaluate(
        self,
        socket: Path,
        model_id: str,
        evaluation: Evaluation,
        limits: GateLimits,
        *,
        rss_mb: float | None,
        cancelled: IsCancelled,
    ) -> tuple[EvaluationSummary | None, str | None, str | None]:
        self.log.append(f"evaluate {model_id}")
        code, message = self.verdicts.get(model_id, (None, None))
        count = len(evaluation.cases)
        passed = 0 if code else count
        summary = EvaluationSummary(
            cases_sha256=evaluation.cases_sha256, cases=count, passed=passed, accuracy=passed / count, rss_mb=rss_mb
        )
        return summary, code, message

    def health(self, socket: Path, timeout_s: float) -> Mapping[str, object] | None:
        self.log.append(f"health {socket.name}")
        return self.healths.get(socket.name)

    def repair(self, package: PackageRef, variant: str, report: Report, cancelled: IsCancelled) -> int:
        self.log.append(f"repair {package.id}")
        self._reach()
        return 1

    def _reach(self) -> None:
        if self.offline_now:
            raise UnavailableError("source.unreachable", "no network", retryable=True)

    def _view(self, want: list[str], freshness: Freshness) -> Refresh:
        return Refresh(
            freshness=freshness,
            root=1,
            timestamp=self.version,
            snapshot=self.version,
            targets=self.version,
            fleet=self.fleet,
            manifests={path: self.published[path].manifest_bytes for path in want if path in self.published},
            refreshed_at=self.refreshed_at,
        )
