"""The serving worker of a slot: started, restarted with back-off, repaired, unloaded. Pure.

It runs beside the deployment: while a new package is downloaded, the old one keeps serving, crashing, and being
repaired. ``deployment`` decides what that means for a deployment that depends on it.
"""

from __future__ import annotations

from dataclasses import replace

from garrison_agent.core import retry
from garrison_agent.core.draft import Draft
from garrison_agent.core.slot import (
    Failure,
    LoadWanted,
    Now,
    Phase,
    Repair,
    Repaired,
    RepairFailed,
    RestartDue,
    SetRestart,
    StartWorker,
    StopWorker,
    UnexpectedEventError,
    UnloadWanted,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
)
from garrison_protocol.manifest import PackageRef

LOAD_TIMEOUT_S = 1800.0
"""Hashing and loading 20 GB from an SD card takes minutes; nothing honest takes longer than this."""
STEADY_S = 60.0
"""A worker that was ready this long did not crash on start."""
MAX_FAILURES = 5
"""So many failures in a row, none of them after a steady time: another try in a few minutes would be the next."""
DAMAGED = frozenset({"model.digest_mismatch", "model.file_missing", "model.manifest_missing"})
"""What a worker cannot start from, but a repair can put right."""
NO_ROOM = "memory."
"""Codes of a start that was refused for want of memory: nothing is wrong with the model, and nothing was tried."""
LOAD_TIMEOUT = "model.load_timeout"

ServiceEvent = (
    WorkerReady | WorkerFailed | WorkerExited | RestartDue | Repaired | RepairFailed | LoadWanted | UnloadWanted
)


def start(draft: Draft, *, urgent: bool = False) -> None:
    """Bring the serving package into memory, unless it is there, on its way, or its lease forbids it."""
    serving = draft.slot.serving
    if serving is None or draft.slot.barred or draft.slot.phase in (Phase.STARTING, Phase.READY, Phase.REPAIRING):
        return
    draft.turn(Phase.STARTING)
    draft.run(StartWorker(serving.package, serving.variant, urgent), SetRestart(draft.slot.turn, LOAD_TIMEOUT_S))


def stop(draft: Draft, reason: str, *, drain: bool = True) -> None:
    """Take the serving package out of memory. A repair goes on: it is about files, not memory."""
    serving = draft.slot.serving
    if serving is None or draft.slot.phase in (Phase.OFF, Phase.REPAIRING):
        return
    draft.turn(Phase.OFF)
    draft.run(StopWorker(serving.package, drain))
    draft.note("model.unloaded", serving.package, reason=reason)


def repair(draft: Draft) -> None:
    """Begin to repair the serving package's files."""
    serving = draft.slot.serving
    if serving is None:
        return
    draft.turn(Phase.REPAIRING)
    draft.run(Repair(draft.slot.turn, serving.package, serving.variant))


def handle(draft: Draft, event: ServiceEvent, now: Now) -> None:
    """Apply one event of the serving worker.

    Raises:
        UnexpectedEventError: The worker cannot report this in its phase; a bug.
    """
    slot = draft.slot
    serving = slot.serving
    match slot.phase, event:
        case _, LoadWanted():
            draft.slot = replace(slot, wanted=True, failures=0 if slot.phase is Phase.FAILED else slot.failures)
            start(draft)
        case _, UnloadWanted(reason):
            draft.slot = replace(slot, wanted=False)
            stop(draft, reason)
        case Phase.STARTING, WorkerReady(package, load_ms, rss_mb):
            draft.turn(Phase.READY)
            draft.slot = replace(draft.slot, ready_at_s=now.monotonic_s, steady_s=0.0)
            draft.note("model.loaded", package, load_ms=load_ms, rss_mb=rss_mb)
        case ((Phase.STARTING | Phase.READY), WorkerFailed(package, code, message)):
            _failed(draft, package, Failure(code, message), now)
        case ((Phase.STARTING | Phase.READY), WorkerExited(package, returncode, code)):
            draft.slot = replace(slot, failure=Failure(code, event.detail))
            draft.note("model.crashed", package, returncode=returncode, code=code, detail=event.detail)
            _back_off(draft, now)
        case Phase.STARTING, RestartDue() if serving is not None:
            draft.run(StopWorker(serving.package, drain=False))
            draft.slot = replace(slot, failure=Failure(LOAD_TIMEOUT, f"it was not ready after {LOAD_TIMEOUT_S:.0f} s"))
            draft.note("model.load_failed", serving.package, code=LOAD_TIMEOUT)
            _back_off(draft, now)
        case ((Phase.BACKOFF | Phase.FAILED), RestartDue()):
            start(draft)
        case Phase.REPAIRING, RestartDue() if serving is not None:
            repair(draft)
        case Phase.REPAIRING, Repaired(chunks=chunks) if serving is not None:
            draft.note("model.repaired", serving.package, chunks=chunks)
            draft.turn(Phase.OFF)
            if slot.wanted:
                start(draft)
        case Phase.REPAIRING, RepairFailed(code=code, message=message) if serving is not None:
            draft.note("model.repair_failed", serving.package, code=code, detail=message)
            draft.slot = replace(draft.slot, failures=slot.failures + 1)
            _repair_after(draft, draft.slot.failures)
        case ((Phase.OFF | Phase.READY), RestartDue()):
            return  # the timer of a load that is over
        case _:
            raise UnexpectedEventError(f"{event!r} while the serving worker of {slot.alias} is {slot.phase.value}")


def _failed(draft: Draft, package: PackageRef, why: Failure, now: Now) -> None:
    failures = draft.slot.failures
    draft.run(StopWorker(package, drain=False))
    draft.slot = replace(draft.slot, failure=why)
    if why.code in DAMAGED:
        draft.note("model.corrupt", package, code=why.code, detail=why.message)
        _repair_after(draft, failures)
        draft.slot = replace(draft.slot, failures=failures + 1)
        return
    draft.note("model.load_failed", package, code=why.code, detail=why.message)
    if why.code.startswith(NO_ROOM):
        draft.turn(Phase.BACKOFF)
        draft.run(SetRestart(draft.slot.turn, retry.SPACE.base_s))
    else:
        _back_off(draft, now)


def _repair_after(draft: Draft, failures: int) -> None:
    """Repair at once the first time; a disk or a network that keeps failing is not worn out."""
    if failures == 0:
        repair(draft)
    else:
        draft.turn(Phase.REPAIRING)
        draft.run(SetRestart(draft.slot.turn, retry.NETWORK.delay_s(failures)))


def _back_off(draft: Draft, now: Now) -> None:
    slot = draft.slot
    steady = slot.phase is Phase.READY and now.monotonic_s - slot.ready_at_s >= STEADY_S
    failures = 1 if steady else slot.failures + 1
    given_up = failures >= MAX_FAILURES
    draft.turn(Phase.FAILED if given_up else Phase.BACKOFF)
    draft.slot = replace(draft.slot, failures=failures)
    if given_up and slot.serving is not None and slot.failure is not None:
        why = slot.failure
        draft.note("alarm.model_failed", slot.serving.package, failures=failures, code=why.code, detail=why.message)
    delay_s = retry.GIVEN_UP_S if given_up else retry.WORKER.delay_s(failures)
    draft.run(SetRestart(draft.slot.turn, delay_s))
