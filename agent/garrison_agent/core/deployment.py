"""The deployment machine of one alias: ``advance(slot, event, now)``, ``resume(slot)``. Pure.

Source: docs/protocol.md, "Deployment". Before LOADING any failure ends in FAILED and the old model never stopped;
from LOADING on it goes through ROLLING_BACK. The alias switches on entering SOAKING.
"""

from __future__ import annotations

from dataclasses import replace

from garrison_agent.core import retry, service
from garrison_agent.core.draft import Draft
from garrison_agent.core.slot import (
    Assign,
    CancelJobs,
    Download,
    Downloaded,
    Evaluate,
    Evaluated,
    Event,
    FilesVerified,
    JobEvent,
    JobFailed,
    Lapse,
    LeaseEnded,
    LeaseRenewed,
    LoadWanted,
    MustWait,
    Now,
    Nudged,
    Phase,
    Place,
    Placed,
    Proceed,
    Proceeded,
    Repaired,
    RepairFailed,
    Resolve,
    Resolved,
    RestartDue,
    Served,
    Serving,
    SetTimer,
    Slot,
    StartWorker,
    Step,
    StopWorker,
    TimerDue,
    UnexpectedEventError,
    UnloadWanted,
    Unsuitable,
    VerifyFiles,
    Withdraw,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
)
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.desired import DesiredAlias
from garrison_protocol.messages.report import EvaluationSummary
from garrison_protocol.states import BEFORE_LOADING, WaitReason
from garrison_protocol.states import DeploymentState as State

EVALUATION_TIMEOUT_S = 3600.0
MAX_RESTARTS = 3
"""Starts of the agent in one deployment from LOADING on, after which the candidate is blamed for them."""
MAX_SOAK_CRASHES = 1
SUPERSEDED = "deployment.superseded"

_SETTLED = frozenset({State.ACTIVE, State.FAILED, State.REJECTED, State.ROLLED_BACK})
SWITCHING = frozenset({State.LOADING, State.EVALUATING, State.SOAKING, State.ROLLING_BACK, State.DOWN})
"""States in which what is loaded is the deployment's business, not an operator's."""


def new_slot(entry: DesiredAlias) -> Slot:
    """Return the slot of an alias that this board has never had; ``Assign`` begins it."""
    return Slot(entry.alias, entry.package, entry.rollout, None, state=State.REMOVED)


def advance(slot: Slot, event: Event, now: Now) -> Step:
    """Return the slot and records to save, and the effects to run after that.

    Events of older attempts, steps, and turns change nothing.

    Raises:
        UnexpectedEventError: The table has no row for this pair; a bug.
    """
    if _stale(slot, event):
        return Step(slot)
    draft = Draft(slot)
    match event:
        case Assign(entry):
            _assign(draft, entry)
        case Withdraw():
            _withdraw(draft)
        case Nudged():
            if slot.state is State.WAITING and slot.wait in (WaitReason.NETWORK, WaitReason.METADATA_STALE):
                _retry(draft, now)
        case Served(seconds):
            _served(draft, seconds)
        case WorkerReady() | WorkerFailed() | WorkerExited() if not _is_serving(slot, event.package):
            _candidate(draft, event)
        case WorkerReady() | WorkerFailed() | WorkerExited() | RestartDue() | Repaired() | RepairFailed():
            _service(draft, event, now)
        case LeaseEnded() | LeaseRenewed():
            _lease(draft, event)
        case LoadWanted() | UnloadWanted():
            _wish(draft, event, now)
        case _:
            _table(draft, event, now)
    return draft.done()


def resume(slot: Slot) -> Step:
    """Return how a saved slot goes on after the agent started again: no worker or job of before exists.

    Needs no network: what served before is loaded from disk, whatever else goes on.
    """
    draft = Draft(replace(slot, attempt=slot.attempt + 1, steady_s=0.0))
    draft.turn(Phase.OFF)
    match slot.state:
        case State.LOADING | State.EVALUATING | State.SOAKING if slot.restarts >= MAX_RESTARTS:
            _roll_back(draft, "deployment.crash_loop", f"{slot.restarts + 1} starts of the agent in {slot.state.value}")
        case State.LOADING | State.EVALUATING:
            draft.slot = replace(draft.slot, restarts=slot.restarts + 1)
            if slot.beside and slot.wanted:
                service.start(draft)
            _load_candidate(draft)
        case State.SOAKING:
            draft.slot = replace(draft.slot, restarts=slot.restarts + 1)
            service.start(draft)
        case State.ROLLING_BACK:
            _restore(draft)
        case State.REPAIRING:
            service.repair(draft)
        case State.REMOVED:
            pass
        case _:
            if slot.wanted or slot.state is State.DOWN:
                service.start(draft)
            _continue(draft)
    return draft.done()


def _continue(draft: Draft) -> None:
    slot = draft.slot
    match slot.state, slot.variant:
        case ((State.ASSIGNED | State.WAITING), _):
            if slot.state is State.WAITING:
                draft.slot = replace(slot, error_code=None, error_message=None)
                draft.enter(State.ASSIGNED)
            draft.run(Resolve(slot.attempt, slot.package))
        case ((State.DOWNLOADING | State.VERIFYING), str(variant)):
            if slot.state is State.VERIFYING:
                draft.enter(State.DOWNLOADING)
            draft.run(Download(slot.attempt, slot.package, variant))
        case State.STAGED, str(variant):
            draft.run(Place(slot.attempt, slot.package, variant))
        case _:
            _settle(draft)


def _stale(slot: Slot, event: Event) -> bool:
    match event:
        case JobEvent(attempt):
            return attempt != slot.attempt
        case TimerDue(step) | Proceeded(step):
            return step != slot.step
        case RestartDue(turn) | Repaired(turn) | RepairFailed(turn):
            return turn != slot.turn
        case LeaseEnded(package) | LeaseRenewed(package):
            return not _is_serving(slot, package)
        case WorkerReady(package) | WorkerFailed(package) | WorkerExited(package):
            return package != slot.package and not _is_serving(slot, package)
    return False


def _is_serving(slot: Slot, package: PackageRef) -> bool:
    return slot.serving is not None and slot.serving.package == package


def _table(draft: Draft, event: Event, now: Now) -> None:
    slot = draft.slot
    match slot.state, event:
        case State.ASSIGNED, Resolved(_, variant, total_bytes):
            if _too_late(slot, now):
                _fail(draft, State.FAILED, "deployment.too_late", "the rollout's start_by has passed")
                return
            draft.slot = replace(slot, variant=variant, total_bytes=total_bytes)
            draft.enter(State.DOWNLOADING)
            draft.run(Download(slot.attempt, slot.package, variant))
        case State.DOWNLOADING, Downloaded() if slot.variant is not None:
            draft.slot = replace(slot, tries=0)
            draft.enter(State.VERIFYING)
            draft.run(VerifyFiles(slot.attempt, slot.package, slot.variant))
        case State.VERIFYING, FilesVerified() if slot.variant is not None:
            draft.enter(State.STAGED)
            draft.run(Place(slot.attempt, slot.package, slot.variant))
        case State.STAGED, Placed(_, beside):
            draft.slot = replace(slot, beside=beside)
            _load_candidate(draft)
        case State.EVALUATING, Evaluated(_, EvaluationSummary() as summary, None):
            draft.slot = replace(slot, evaluation=summary)
            _promote(draft, summary, now)
        case State.EVALUATING, Evaluated(_, summary, code, message):
            draft.slot = replace(slot, evaluation=summary)
            _roll_back(draft, code or "gate.error", message or "the gate gave no result")
        case (
            (State.ASSIGNED | State.DOWNLOADING | State.VERIFYING | State.STAGED),
            MustWait(_, reason, code, message),
        ):
            _wait(draft, reason, code, message)
        case ((State.ASSIGNED | State.STAGED), Unsuitable(_, code, message)):
            _fail(draft, State.REJECTED, code, message)
        case ((State.ASSIGNED | State.DOWNLOADING | State.VERIFYING | State.STAGED), JobFailed(_, code, message)):
            _fail(draft, State.FAILED, code, message)
        case State.EVALUATING, JobFailed(_, code, message):
            _roll_back(draft, code, message)
        case State.WAITING, TimerDue():
            _retry(draft, now)
        case State.LOADING, TimerDue():
            _roll_back(draft, "model.load_timeout", f"no worker was ready after {service.LOAD_TIMEOUT_S:.0f} s")
        case State.EVALUATING, TimerDue():
            _roll_back(draft, "gate.timeout", f"the gate had no result after {EVALUATION_TIMEOUT_S:.0f} s")
        case State.ROLLING_BACK, Proceeded():
            if slot.phase is not Phase.STARTING:
                down = slot.phase in (Phase.REPAIRING, Phase.BACKOFF, Phase.FAILED)
                _rolled_back(draft, State.DOWN if down else State.ROLLED_BACK)
        case ((State.ACTIVE | State.FAILED | State.REJECTED | State.ROLLED_BACK | State.DOWN), Proceeded()):
            if slot.desired is not None and _pending(slot):
                _begin(draft, slot.desired)
        case _:
            raise UnexpectedEventError(f"{event!r} in state {slot.state.value} of {slot.alias}")


def _candidate(draft: Draft, event: WorkerReady | WorkerFailed | WorkerExited) -> None:
    slot = draft.slot
    match slot.state, event:
        case State.LOADING, WorkerReady(package, load_ms, rss_mb):
            draft.note("model.loaded", package, load_ms=load_ms, rss_mb=rss_mb, candidate=True)
            _evaluate(draft)
        case ((State.LOADING | State.EVALUATING), WorkerFailed(package, code, message)):
            if code in service.DAMAGED:
                draft.note("model.corrupt", package, code=code, detail=message)
            _roll_back(draft, code, message)
        case ((State.LOADING | State.EVALUATING), WorkerExited(code=code)):
            _roll_back(draft, code, event.detail)
        case _:
            raise UnexpectedEventError(f"{event!r} of a candidate in state {slot.state.value} of {slot.alias}")


def _service(
    draft: Draft, event: WorkerReady | WorkerFailed | WorkerExited | RestartDue | Repaired | RepairFailed, now: Now
) -> None:
    slot = draft.slot
    match slot.state, event:
        case State.SOAKING, WorkerFailed(_, code, message):
            _roll_back(draft, code, message)
            return
        case State.SOAKING, WorkerExited():
            draft.slot = replace(slot, crashes=slot.crashes + 1)
            if slot.crashes >= MAX_SOAK_CRASHES:
                _roll_back(draft, "soak.crashed", f"{slot.crashes + 1} crashes; the last time {event.detail}")
                return
    service.handle(draft, event, now)
    match slot.state, draft.slot.phase:
        case State.ACTIVE, Phase.REPAIRING:
            draft.enter(State.REPAIRING)
        case State.REPAIRING, Phase.READY | Phase.OFF:
            draft.enter(State.ACTIVE)
        case State.ROLLING_BACK, Phase.BACKOFF | Phase.REPAIRING | Phase.FAILED:
            _rolled_back(draft, State.DOWN)
        case State.ROLLING_BACK | State.DOWN, Phase.READY | Phase.OFF:
            _rolled_back(draft, State.ROLLED_BACK)


def _wish(draft: Draft, event: LoadWanted | UnloadWanted, now: Now) -> None:
    slot = draft.slot
    if slot.serving is None or slot.state is State.REMOVED:
        return
    revives = isinstance(event, LoadWanted) and slot.state is State.DOWN and slot.phase is Phase.FAILED
    if slot.state in SWITCHING and (isinstance(event, UnloadWanted) or not slot.beside) and not revives:
        return  # what is loaded now is the deployment's business
    service.handle(draft, event, now)


def _lease(draft: Draft, event: LeaseEnded | LeaseRenewed) -> None:
    """Note a lease that has run out or counts anew; unload the model, or load it again, where it says so."""
    slot = draft.slot
    match event:
        case LeaseEnded(package, stops, fresh_at_s):
            draft.slot = replace(slot, lapse=Lapse(package, stops, fresh_at_s))
            draft.note("lease.ended", package, stops=stops, fresh_at=int(fresh_at_s))
            if stops:
                if slot.phase is Phase.OFF:  # its worker may be in the middle of its last answers
                    draft.run(StopWorker(package, drain=False))
                service.stop(draft, "lease", drain=False)
                if slot.state is State.ROLLING_BACK and draft.slot.phase is Phase.OFF:
                    draft.run(Proceed(slot.step))  # there is nothing to wait for any more
        case LeaseRenewed(package):
            draft.slot = replace(slot, lapse=None)
            draft.note("lease.renewed", package)
            instead = slot.state in (State.LOADING, State.EVALUATING) and not slot.beside
            if slot.barred and (slot.wanted or slot.state is State.DOWN) and not instead:
                service.start(draft)


def _assign(draft: Draft, entry: DesiredAlias) -> None:
    old, state = draft.slot.desired, draft.slot.state
    draft.slot = replace(draft.slot, desired=entry)
    slot = draft.slot
    if state is State.REMOVED:
        _begin(draft, entry)
        return
    if (old is None or old.loaded != entry.loaded) and state not in SWITCHING:
        draft.slot = replace(slot, wanted=entry.loaded)
        if entry.loaded:
            service.start(draft)
        else:
            service.stop(draft, "desired")
    if (entry.package, entry.rollout) == (slot.package, slot.rollout):
        return
    if state in BEFORE_LOADING:
        draft.enter(State.SUPERSEDED)
        draft.run(CancelJobs())
        _begin(draft, entry)
    elif state in (State.LOADING, State.EVALUATING, State.SOAKING):
        if entry.package == slot.package:
            _adopt(draft, entry)
        else:
            _roll_back(draft, SUPERSEDED, f"{entry.package.id} is desired now")
    elif state is not State.ROLLING_BACK:
        _begin(draft, entry)


def _adopt(draft: Draft, entry: DesiredAlias) -> None:
    """Carry on with the same package under another rollout; its limits decide from now on."""
    state = draft.slot.state
    draft.slot = replace(draft.slot, rollout=entry.rollout, attempt=draft.slot.attempt + 1)
    if state is State.EVALUATING:
        draft.run(CancelJobs())
        _evaluate(draft)
        return
    draft.enter(state)
    if state is State.LOADING:
        draft.run(SetTimer(draft.slot.step, service.LOAD_TIMEOUT_S))


def _begin(draft: Draft, entry: DesiredAlias) -> None:
    slot = draft.slot
    serving = slot.serving
    if slot.state is State.DOWN and serving is not None and serving.package == entry.package:
        # It cannot serve as it is, so it comes in anew: checked on disk, evaluated, soaked.
        draft.run(CancelJobs(), StopWorker(serving.package, drain=False))
        draft.turn(Phase.OFF)
        serving = None
    draft.slot = replace(
        draft.slot,
        package=entry.package,
        rollout=entry.rollout,
        attempt=slot.attempt + 1,
        variant=None,
        total_bytes=0,
        tries=0,
        beside=False,
        restarts=0,
        soaked_s=0.0,
        steady_s=0.0,
        crashes=0,
        error_code=None,
        error_message=None,
        evaluation=None,
        serving=serving,
        previous=None,
    )
    if serving is None or serving.package != entry.package:
        draft.enter(State.ASSIGNED)
        draft.run(Resolve(draft.slot.attempt, entry.package))
        return
    draft.slot = replace(draft.slot, variant=serving.variant, evaluation=serving.evaluation, wanted=entry.loaded)
    draft.enter(State.REPAIRING if draft.slot.phase is Phase.REPAIRING else State.ACTIVE)
    if entry.loaded:
        service.start(draft)
    else:
        service.stop(draft, "desired")


def _withdraw(draft: Draft) -> None:
    slot = draft.slot
    draft.slot = replace(slot, desired=None)
    if slot.state is State.REMOVED:
        return
    draft.run(CancelJobs())
    draft.run(StopWorker(slot.package))
    if slot.serving is not None and slot.serving.package != slot.package:
        draft.run(StopWorker(slot.serving.package))
    draft.turn(Phase.OFF)
    draft.slot = replace(draft.slot, attempt=slot.attempt + 1, serving=None, previous=None, evaluation=None)
    draft.enter(State.REMOVED)


def _load_candidate(draft: Draft) -> None:
    if not draft.slot.beside:
        service.stop(draft, "switch")
    if draft.slot.state is not State.LOADING:
        draft.enter(State.LOADING)
    slot = draft.slot
    assert slot.variant is not None
    draft.run(StartWorker(slot.package, slot.variant), SetTimer(slot.step, service.LOAD_TIMEOUT_S))


def _evaluate(draft: Draft) -> None:
    draft.enter(State.EVALUATING)
    slot = draft.slot
    assert slot.variant is not None
    assert slot.desired is not None
    draft.run(
        Evaluate(slot.attempt, slot.package, slot.variant, slot.desired.limits),
        SetTimer(slot.step, EVALUATION_TIMEOUT_S),
    )


def _promote(draft: Draft, summary: EvaluationSummary, now: Now) -> None:
    """Switch the alias to the candidate; the model before it leaves memory but stays on disk for a rollback."""
    slot = draft.slot
    assert slot.variant is not None
    service.stop(draft, "switch")
    draft.turn(Phase.READY)
    if slot.lapse is not None and slot.lapse.package == slot.package:  # it served here before, and came in fresh again
        draft.slot = replace(draft.slot, lapse=None)
        draft.note("lease.renewed", slot.package)
    draft.slot = replace(
        draft.slot,
        previous=slot.serving,
        serving=Serving(slot.package, slot.variant, summary),
        wanted=True,
        failures=0,
        failure=None,
        ready_at_s=now.monotonic_s,
    )
    draft.enter(State.SOAKING)


def _served(draft: Draft, seconds: float) -> None:
    slot = draft.slot
    if slot.state is not State.SOAKING or slot.phase is not Phase.READY or slot.desired is None:
        return
    steady_s = slot.steady_s + seconds
    draft.slot = replace(
        slot,
        soaked_s=slot.soaked_s + seconds,
        steady_s=steady_s,
        restarts=0 if steady_s >= service.STEADY_S else slot.restarts,
    )
    if draft.slot.soaked_s >= slot.desired.soak_s:
        draft.slot = replace(draft.slot, previous=None, restarts=0, wanted=slot.desired.loaded)
        draft.enter(State.ACTIVE)
        if not slot.desired.loaded:
            service.stop(draft, "desired")


def _wait(draft: Draft, reason: WaitReason, code: str, message: str) -> None:
    tries = draft.slot.tries + 1
    draft.slot = replace(draft.slot, wait=reason, tries=tries, error_code=code, error_message=message)
    draft.enter(State.WAITING)
    backoff = retry.SPACE if reason in (WaitReason.DISK, WaitReason.BUSY) else retry.NETWORK
    draft.run(SetTimer(draft.slot.step, backoff.delay_s(tries), jitter=True))


def _retry(draft: Draft, now: Now) -> None:
    slot = draft.slot
    if _too_late(slot, now):
        _fail(draft, State.FAILED, "deployment.too_late", "the rollout's start_by has passed")
        return
    draft.slot = replace(slot, attempt=slot.attempt + 1, error_code=None, error_message=None)
    draft.enter(State.ASSIGNED)
    draft.run(Resolve(draft.slot.attempt, slot.package))


def _fail(draft: Draft, state: State, code: str, message: str) -> None:
    draft.slot = replace(draft.slot, error_code=code, error_message=message)
    draft.enter(state)


def _roll_back(draft: Draft, code: str, message: str) -> None:
    slot = draft.slot
    if slot.state is State.SOAKING:
        draft.turn(Phase.OFF)
        draft.slot = replace(draft.slot, serving=slot.previous, previous=None, failures=0, failure=None)
    draft.slot = replace(draft.slot, attempt=slot.attempt + 1, error_code=code, error_message=message)
    draft.enter(State.ROLLING_BACK)
    draft.run(CancelJobs(), StopWorker(slot.package, drain=False))
    _restore(draft)


def _restore(draft: Draft) -> None:
    """Let the model before serve again; STARTING and BACKOFF have their own event to come."""
    slot = draft.slot
    if slot.serving is None or not slot.wanted or slot.barred or slot.phase in (Phase.READY, Phase.REPAIRING):
        draft.run(Proceed(slot.step))
    elif slot.phase in (Phase.OFF, Phase.FAILED):
        service.start(draft, urgent=True)


def _rolled_back(draft: Draft, state: State) -> None:
    if state is State.DOWN and draft.slot.serving is not None:
        draft.note("alarm.model_down", draft.slot.serving.package)
    draft.enter(state)
    _settle(draft)


def _settle(draft: Draft) -> None:
    if _pending(draft.slot):
        draft.run(Proceed(draft.slot.step))


def _pending(slot: Slot) -> bool:
    """Tell whether another deployment was desired while this one rolled back."""
    wanted = slot.desired
    if wanted is None or not (slot.state in _SETTLED or slot.state is State.DOWN):
        return False
    return (wanted.package, wanted.rollout) != (slot.package, slot.rollout) or slot.error_code == SUPERSEDED


def _too_late(slot: Slot, now: Now) -> bool:
    return slot.desired is not None and slot.desired.start_by is not None and now.wall_s > slot.desired.start_by
