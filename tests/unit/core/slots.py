"""Slots, events, and a board without adapters, for tests of the deployment machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from garrison_agent.core import slot as core
from garrison_agent.core.deployment import advance, new_slot, resume
from garrison_agent.core.slot import Assign, Effect, Event, Now, Phase, Serving, Slot, Step
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.desired import DesiredAlias
from garrison_protocol.messages.report import EvaluationSummary
from garrison_protocol.states import DeploymentState as State
from garrison_protocol.states import WaitReason

NOW = Now(wall_s=1_800_000_000.0, monotonic_s=1000.0)
OLD = PackageRef(name="chat", version="1.0", manifest_sha256="1" * 64)
NEW = PackageRef(name="chat", version="2.0", manifest_sha256="2" * 64)
THIRD = PackageRef(name="chat", version="3.0", manifest_sha256="3" * 64)
SUMMARY = EvaluationSummary(cases_sha256="a" * 64, cases=2, passed=2, accuracy=1.0)


def entry(package: PackageRef = NEW, rollout: str = "r2", soak_s: float = 10, **more: object) -> DesiredAlias:
    return DesiredAlias.model_validate(
        {"alias": "chat", "package": package, "rollout": rollout, "soak_s": soak_s, **more}
    )


def slot_in(state: State, *, old: bool = True) -> Slot:
    """A plausible slot that deploys NEW; with ``old``, OLD served before."""
    serving = Serving(OLD, "cpu", SUMMARY) if old else None
    slot = Slot("chat", NEW, "r2", entry(), state=state, step=7, attempt=3, serving=serving)
    slot = replace(slot, phase=Phase.READY if old else Phase.OFF, turn=2)
    known = replace(slot, variant="cpu", total_bytes=100)
    match state:
        case State.ASSIGNED:
            return slot
        case State.WAITING:
            return replace(slot, wait=WaitReason.NETWORK, tries=1)
        case State.LOADING | State.EVALUATING:
            return replace(known, beside=True)
        case State.SOAKING:
            new = Serving(NEW, "cpu", SUMMARY)
            return replace(known, serving=new, previous=serving, phase=Phase.READY, evaluation=SUMMARY)
        case State.ACTIVE:
            return replace(known, serving=Serving(NEW, "cpu", SUMMARY), phase=Phase.READY, evaluation=SUMMARY)
        case State.REPAIRING:
            return replace(known, serving=Serving(NEW, "cpu", SUMMARY), phase=Phase.REPAIRING)
        case State.ROLLING_BACK:
            return replace(known, phase=Phase.STARTING if old else Phase.OFF, error_code="gate.accuracy")
        case State.DOWN:
            return replace(known, serving=Serving(OLD, "cpu"), phase=Phase.BACKOFF, error_code="gate.accuracy")
        case State.REMOVED:
            return replace(slot, serving=None, phase=Phase.OFF, desired=None)
        case State.FAILED | State.REJECTED | State.ROLLED_BACK:
            return replace(known, error_code="some.code", error_message="why")
    return known


@dataclass
class World:
    """What a board's adapters would answer. A crash loses all of it but the disk."""

    corrupt: set[PackageRef] = field(default_factory=set)
    """Packages whose files are damaged on the disk until they are repaired."""
    bad: set[PackageRef] = field(default_factory=set)
    """Packages that the gate refuses."""
    dying: set[PackageRef] = field(default_factory=set)
    """Packages whose worker ends whenever it has served for a while."""
    unsuitable: set[PackageRef] = field(default_factory=set)
    offline: bool = False
    room_beside: bool = True


class Board:
    """Runs the pure machine the way the owner does: save, then effects; answers come back as events."""

    def __init__(self, world: World, saved: Slot | None = None) -> None:
        self.world = world
        self.saved = saved
        self.workers: set[PackageRef] = set()
        self.queue: list[Event] = []
        self.timers: list[Event] = []
        self.now_s = 1000.0
        self.saves = 0
        self.crash_at: int | None = None
        self.history: list[State] = []
        self.kinds: list[str] = []

    @property
    def slot(self) -> Slot:
        assert self.saved is not None
        return self.saved

    def assign(self, wanted: DesiredAlias) -> None:
        self.commit(advance(self.saved or new_slot(wanted), Assign(wanted), self.now()))

    def deliver(self, event: Event) -> None:
        self.commit(advance(self.slot, event, self.now()))

    def now(self) -> Now:
        return Now(1_800_000_000.0 + self.now_s, self.now_s)

    def commit(self, step: Step) -> None:
        if step.slot != self.saved:
            if self.saved is None or step.slot.state is not self.saved.state:
                self.history.append(step.slot.state)
            self.saved = step.slot
            self.saves += 1
            self.kinds.extend(record.kind for record in step.records)
            if self.saves == self.crash_at:
                raise KilledError
        for effect in step.effects:
            self.run(effect)

    def restart(self) -> None:
        """A new process: nothing is left but the saved slot."""
        self.workers.clear()
        self.queue.clear()
        self.timers.clear()
        if self.saved is not None:
            self.commit(resume(self.saved))

    def settle(self, limit: int = 400) -> None:
        """Let events and timers run until nothing happens any more."""
        for _ in range(limit):
            if self.queue:
                self.deliver(self.queue.pop(0))
            elif self.saved is not None and self.slot.state is State.SOAKING and self.slot.phase is Phase.READY:
                self.now_s += 5
                if self.slot.package in self.world.dying:
                    self.workers.discard(self.slot.package)
                    self.deliver(core.WorkerExited(self.slot.package, -11))
                else:
                    self.deliver(core.Served(5.0))
            elif self.timers and not self.done:
                self.now_s += 1
                self.deliver(self.timers.pop(0))
            else:
                return
        raise AssertionError(f"the board never comes to rest: {self.history[-20:]}")

    @property
    def done(self) -> bool:
        slot = self.slot
        loaded = slot.serving is None or slot.phase is Phase.READY or not slot.wanted
        return slot.state.terminal and slot.state is not State.DOWN and loaded

    def run(self, effect: Effect) -> None:
        world = self.world
        match effect:
            case core.Resolve(attempt, package):
                if world.offline:
                    self.queue.append(core.MustWait(attempt, WaitReason.NETWORK, "source.unreachable", "no network"))
                elif package in world.unsuitable:
                    self.queue.append(core.Unsuitable(attempt, "requirements.not_met", "too big"))
                else:
                    self.queue.append(core.Resolved(attempt, "cpu", 100))
            case core.Download(attempt):
                self.queue.append(core.Downloaded(attempt))
            case core.VerifyFiles(attempt):
                self.queue.append(core.FilesVerified(attempt))
            case core.Place(attempt):
                self.queue.append(core.Placed(attempt, world.room_beside))
            case core.Evaluate(attempt, package):
                assert package in self.workers
                if package in world.bad:
                    self.queue.append(core.Evaluated(attempt, SUMMARY, "gate.accuracy", "worse"))
                else:
                    self.queue.append(core.Evaluated(attempt, SUMMARY))
            case core.StartWorker(package):
                if package in world.corrupt:
                    self.queue.append(core.WorkerFailed(package, "model.digest_mismatch", "flipped"))
                    return
                self.workers.add(package)
                self.queue.append(core.WorkerReady(package, 5, 100))
            case core.StopWorker(package):
                self.workers.discard(package)
                words = (core.WorkerReady, core.WorkerFailed, core.WorkerExited)
                self.queue = [one for one in self.queue if not (isinstance(one, words) and one.package == package)]
            case core.Repair(turn, package):
                if world.offline:
                    self.queue.append(core.RepairFailed(turn, "source.unreachable", "no network"))
                else:
                    world.corrupt.discard(package)
                    self.queue.append(core.Repaired(turn, 1))
            case core.SetTimer(step):
                self.timers.append(core.TimerDue(step))
            case core.SetRestart(turn):
                self.timers.append(core.RestartDue(turn))
            case core.Proceed(step):
                self.queue.append(core.Proceeded(step))
            case core.CancelJobs():
                self.queue = [one for one in self.queue if not isinstance(one, core.JobEvent)]


class KilledError(Exception):
    """The process ended right after a save, before any effect."""


def events(slot: Slot) -> dict[str, Event]:
    """One event of every kind, belonging to the slot's attempt, step, and turn, by a short name."""
    serving = slot.serving.package if slot.serving else OLD
    return {
        "assign_same": Assign(entry(NEW, "r2")),
        "assign_new_rollout": Assign(entry(NEW, "r3")),
        "assign_other": Assign(entry(THIRD, "r3")),
        "assign_old": Assign(entry(OLD, "r3")),
        "withdraw": core.Withdraw(),
        "resolved": core.Resolved(slot.attempt, "cpu", 100),
        "downloaded": core.Downloaded(slot.attempt),
        "files_verified": core.FilesVerified(slot.attempt),
        "placed": core.Placed(slot.attempt, beside=True),
        "passed": core.Evaluated(slot.attempt, SUMMARY),
        "not_passed": core.Evaluated(slot.attempt, SUMMARY, "gate.accuracy", "worse"),
        "must_wait": core.MustWait(slot.attempt, WaitReason.DISK, "disk.insufficient", "full"),
        "unsuitable": core.Unsuitable(slot.attempt, "requirements.not_met", "too big"),
        "job_failed": core.JobFailed(slot.attempt, "download.digest_mismatch", "wrong bytes"),
        "candidate_ready": core.WorkerReady(NEW),
        "candidate_failed": core.WorkerFailed(NEW, "model.load_failed", "no"),
        "candidate_exited": core.WorkerExited(NEW, -11),
        "serving_ready": core.WorkerReady(serving),
        "serving_failed": core.WorkerFailed(serving, "model.load_failed", "no"),
        "serving_corrupt": core.WorkerFailed(serving, "model.digest_mismatch", "flipped"),
        "serving_exited": core.WorkerExited(serving, -9),
        "timer_due": core.TimerDue(slot.step),
        "proceeded": core.Proceeded(slot.step),
        "nudged": core.Nudged(),
        "served": core.Served(5.0),
        "served_enough": core.Served(50.0),
        "restart_due": core.RestartDue(slot.turn),
        "repaired": core.Repaired(slot.turn, 1),
        "repair_failed": core.RepairFailed(slot.turn, "source.unreachable", "no network"),
        "load_wanted": core.LoadWanted(),
        "unload_wanted": core.UnloadWanted(),
    }
