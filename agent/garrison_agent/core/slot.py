"""What the deployment machine works on: a slot per alias, the events it takes, the effects it asks for.

A slot is the whole truth about one alias. It is saved before any of its effects run, and every saved slot has a
resume point (``deployment.resume``). Effects may be repeated after a crash.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.desired import DesiredAlias, GateLimits
from garrison_protocol.messages.report import EvaluationSummary
from garrison_protocol.states import DeploymentState, WaitReason


class UnexpectedEventError(Exception):
    """The table has no row for this pair of state and event: a bug, which ends the process."""


@dataclass(frozen=True, slots=True)
class Now:
    """One moment on two clocks. Durations use ``monotonic_s``; only windows and ages use ``wall_s`` (Unix seconds)."""

    wall_s: float
    monotonic_s: float


class Phase(StrEnum):
    """Where the worker of the *serving* package stands. Nothing of it survives the process."""

    OFF = "off"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    REPAIRING = "repairing"
    FAILED = "failed"
    """It failed again and again without ever being steady: tried again rarely, or when somebody asks for it."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A package that answers, or last answered, under the alias, and what the gate measured for it here."""

    package: PackageRef
    variant: str
    evaluation: EvaluationSummary | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the serving worker last ended, or could not begin."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Lapse:
    """A package whose lease has run out, since metadata that was last verified at ``fresh_at_s`` (Unix seconds)."""

    package: PackageRef
    stops: bool
    """It must not serve until then; False: it serves on, and the board says so."""
    fresh_at_s: float


@dataclass(frozen=True, slots=True)
class Slot:
    """One alias. The first block is the deployment, the second what serves while and after it runs."""

    alias: str
    package: PackageRef
    rollout: str
    desired: DesiredAlias | None
    """What the newest desired state says; None: no longer desired."""
    state: DeploymentState = DeploymentState.ASSIGNED
    step: int = 0
    """Counts state changes for ever; a timer belongs to the step it was set in."""
    attempt: int = 0
    """Counts beginnings; a job's events carry the attempt that started it."""
    variant: str | None = None
    total_bytes: int = 0
    wait: WaitReason | None = None
    tries: int = 0
    """Waits in a row, for back-off."""
    beside: bool = False
    """The candidate is loaded beside the serving model; False: instead of it."""
    restarts: int = 0
    """Starts of the agent that found the slot between LOADING and SOAKING, since it last served steadily."""
    soaked_s: float = 0.0
    """Time in service during the soak."""
    steady_s: float = 0.0
    """Time in service since the worker last started, during the soak."""
    crashes: int = 0
    """Worker crashes during the soak."""
    error_code: str | None = None
    error_message: str | None = None
    evaluation: EvaluationSummary | None = None

    serving: Serving | None = None
    previous: Serving | None = None
    """What served before the candidate took the alias; a rollback restores it."""
    wanted: bool = True
    """The serving model is to stay loaded (desired state, then the operator, decide)."""
    lapse: Lapse | None = None
    phase: Phase = Phase.OFF
    turn: int = 0
    """Counts changes of ``phase``; a restart timer or a repair belongs to its turn."""
    failures: int = 0
    """Failures of the serving worker in a row, for back-off."""
    failure: Failure | None = None
    """The serving worker's last one; it stays until another package serves."""
    ready_at_s: float = 0.0
    """Monotonic time at which the serving worker became ready."""

    @property
    def lease_ended(self) -> bool:
        """Whether the lease of what serves has run out."""
        return self.lapse is not None and self.serving is not None and self.lapse.package == self.serving.package

    @property
    def barred(self) -> bool:
        """Whether what serves must not be loaded until fresh metadata has come."""
        return self.lease_ended and self.lapse is not None and self.lapse.stops

    def uses(self) -> tuple[tuple[PackageRef, str], ...]:
        """Return every package and variant whose files must not be collected now."""
        found = [(served.package, served.variant) for served in (self.serving, self.previous) if served is not None]
        if self.variant is not None and not (self.state.failed or self.state is DeploymentState.REMOVED):
            found.append((self.package, self.variant))
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Record:
    """An audit entry to write in the transaction that saves the slot."""

    kind: str
    facts: dict[str, str | int | bool | None] = field(default_factory=dict)


# Events. A job's event names its attempt; a worker's names its package; a timer's names its step or turn.


@dataclass(frozen=True, slots=True)
class Assign:
    """A newer desired state wants this."""

    entry: DesiredAlias


@dataclass(frozen=True, slots=True)
class Withdraw:
    """A newer desired state no longer has the alias."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that a job of one attempt reports."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Resolved(JobEvent):
    """Fresh trusted metadata has the package, and a variant fits this board."""

    variant: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Downloaded(JobEvent):
    """All files of the variant are on disk."""


@dataclass(frozen=True, slots=True)
class FilesVerified(JobEvent):
    """All files of the variant were read back and match."""


@dataclass(frozen=True, slots=True)
class Placed(JobEvent):
    """Memory suffices: beside the serving model or, if not ``beside``, instead of it."""

    beside: bool


@dataclass(frozen=True, slots=True)
class Evaluated(JobEvent):
    """The gate ran; ``code`` is None if the candidate passed."""

    summary: EvaluationSummary | None
    code: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class MustWait(JobEvent):
    """The job cannot go on now but may later."""

    reason: WaitReason
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Unsuitable(JobEvent):
    """The board does not meet the package's requirements."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class JobFailed(JobEvent):
    """The job failed for good."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has verified and loaded the package and listens."""

    package: PackageRef
    load_ms: int = 0
    rss_mb: int = 0


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A worker could not bring the package into service."""

    package: PackageRef
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker ended that nobody had stopped. ``message`` says how, as far as it is known."""

    package: PackageRef
    returncode: int
    code: str = "model.crashed"
    """``worker.stalled`` or ``worker.out_of_memory`` where that is why."""
    message: str = ""

    @property
    def detail(self) -> str:
        """How it ended."""
        return self.message or f"its worker ended with status {self.returncode}"


@dataclass(frozen=True, slots=True)
class TimerDue:
    """The timer of the deployment's ``step`` ran out: a wait is over, or a load or evaluation took too long."""

    step: int


@dataclass(frozen=True, slots=True)
class Proceeded:
    """Go on from ``step``, which is saved by now."""

    step: int


@dataclass(frozen=True, slots=True)
class Nudged:
    """Network or metadata came back: a deployment that waits for them tries at once."""


@dataclass(frozen=True, slots=True)
class Served:
    """The serving worker was ready for ``seconds`` more."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RestartDue:
    """The serving worker's timer of ``turn`` ran out: restart it, or give up on a load that hangs."""

    turn: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """The serving package's files are whole again."""

    turn: int
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class RepairFailed:
    """The repair did not succeed this time."""

    turn: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """The lease of ``package`` has run out, counted from the last fresh metadata at ``fresh_at_s``."""

    package: PackageRef
    stops: bool
    fresh_at_s: float


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """Fresh metadata was verified: the lease of ``package`` counts anew."""

    package: PackageRef


@dataclass(frozen=True, slots=True)
class LoadWanted:
    """An operator or a request wants the serving model loaded."""


@dataclass(frozen=True, slots=True)
class UnloadWanted:
    """The serving model is to leave memory, until somebody wants it again."""

    reason: str = "operator"
    """``idle``: its keep-alive ended; ``evicted``: another model needs the room."""


Event = (
    Assign
    | Withdraw
    | Resolved
    | Downloaded
    | FilesVerified
    | Placed
    | Evaluated
    | MustWait
    | Unsuitable
    | JobFailed
    | WorkerReady
    | WorkerFailed
    | WorkerExited
    | TimerDue
    | Proceeded
    | Nudged
    | Served
    | RestartDue
    | Repaired
    | RepairFailed
    | LeaseEnded
    | LeaseRenewed
    | LoadWanted
    | UnloadWanted
)


# Effects. The owner runs them in order, after the slot is saved.


@dataclass(frozen=True, slots=True)
class Resolve:
    """Find the package in trusted, fresh metadata and choose a variant -> Resolved, MustWait, Unsuitable, JobFailed."""

    attempt: int
    package: PackageRef


@dataclass(frozen=True, slots=True)
class Download:
    """Make room, then fetch what is missing -> Downloaded, MustWait, JobFailed."""

    attempt: int
    package: PackageRef
    variant: str


@dataclass(frozen=True, slots=True)
class VerifyFiles:
    """Read every file back and compare -> FilesVerified, JobFailed."""

    attempt: int
    package: PackageRef
    variant: str


@dataclass(frozen=True, slots=True)
class Place:
    """Decide on memory -> Placed, MustWait, JobFailed."""

    attempt: int
    package: PackageRef
    variant: str


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Run the gate against the candidate's worker -> Evaluated."""

    attempt: int
    package: PackageRef
    variant: str
    limits: GateLimits


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker unless one runs for the package -> WorkerReady, WorkerFailed, WorkerExited."""

    package: PackageRef
    variant: str
    urgent: bool = False
    """What it has to wait for gets no more time for its answers."""


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End the package's worker, if any; nothing it says is heard from now on."""

    package: PackageRef
    drain: bool = True
    """Answers that it is in the middle of may come to their end first."""


@dataclass(frozen=True, slots=True)
class CancelJobs:
    """Whatever runs for this alias is no longer wanted."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Fetch the wrong chunks of an installed package again -> Repaired, RepairFailed."""

    turn: int
    package: PackageRef
    variant: str


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Post TimerDue(step) after ``delay_s``; ``jitter`` spreads waits of a fleet."""

    step: int
    delay_s: float
    jitter: bool = False


@dataclass(frozen=True, slots=True)
class SetRestart:
    """Post RestartDue(turn) after ``delay_s``."""

    turn: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Proceed:
    """Post Proceeded(step)."""

    step: int


Effect = (
    Resolve
    | Download
    | VerifyFiles
    | Place
    | Evaluate
    | StartWorker
    | StopWorker
    | CancelJobs
    | Repair
    | SetTimer
    | SetRestart
    | Proceed
)


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from one event: the slot and records to save, then the effects to run."""

    slot: Slot
    effects: tuple[Effect, ...] = ()
    records: tuple[Record, ...] = ()
