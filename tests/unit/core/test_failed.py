"""A worker that fails again and again is given up for a while, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from garrison_agent.core import retry, service
from garrison_agent.core import slot as core
from garrison_agent.core.deployment import advance
from garrison_agent.core.slot import Now, Phase, SetRestart, Slot, StartWorker
from garrison_protocol.states import DeploymentState as State
from tests.unit.core.slots import NEW, NOW, OLD, THIRD, entry, slot_in

OOM = core.WorkerExited(NEW, -9, "worker.out_of_memory", "its worker was ended by the kernel, out of memory")


def crash(slot: Slot, *, after_s: float = 1.0) -> core.Step:
    """Let the serving worker start, be ready for a while, and end."""
    if slot.phase is not Phase.READY:
        slot = advance(slot, core.RestartDue(slot.turn), NOW).slot
        slot = advance(slot, core.WorkerReady(NEW), NOW).slot
    slot = replace(slot, ready_at_s=NOW.monotonic_s)
    return advance(slot, OOM, Now(NOW.wall_s, NOW.monotonic_s + after_s))


def failed() -> core.Step:
    step = core.Step(slot_in(State.ACTIVE))
    for _ in range(service.MAX_FAILURES):
        step = crash(step.slot)
    return step


def test_five_failures_in_a_row_are_enough() -> None:
    slot = slot_in(State.ACTIVE)
    for _ in range(service.MAX_FAILURES - 1):
        slot = crash(slot).slot
        assert slot.phase is Phase.BACKOFF
    step = crash(slot)
    assert step.slot.phase is Phase.FAILED
    assert step.slot.failure == core.Failure(OOM.code, OOM.message)
    assert [record.kind for record in step.records] == ["model.crashed", "alarm.model_failed"]
    assert step.records[1].facts["code"] == "worker.out_of_memory"
    assert step.effects == (SetRestart(step.slot.turn, retry.GIVEN_UP_S),)


def test_a_steady_time_between_them_counts_as_a_new_beginning() -> None:
    slot = slot_in(State.ACTIVE)
    for _ in range(2 * service.MAX_FAILURES):
        slot = crash(slot, after_s=service.STEADY_S).slot
        assert slot.phase is Phase.BACKOFF


def test_a_rare_retry_that_fails_too_is_given_up_at_once() -> None:
    slot = failed().slot
    step = advance(slot, core.RestartDue(slot.turn), NOW)
    assert step.effects[0] == StartWorker(NEW, "cpu")
    assert advance(step.slot, OOM, NOW).slot.phase is Phase.FAILED


@pytest.mark.parametrize("state", [State.ACTIVE, State.DOWN])
def test_an_operator_who_loads_it_gives_it_all_its_chances(state: State) -> None:
    slot = replace(failed().slot, state=state)
    step = advance(slot, core.LoadWanted(), NOW)
    assert step.slot.phase is Phase.STARTING
    assert advance(step.slot, OOM, NOW).slot.phase is Phase.BACKOFF


def test_a_new_deployment_goes_its_way() -> None:
    slot = advance(failed().slot, core.Assign(entry(THIRD, "r3")), NOW).slot
    assert slot.state is State.ASSIGNED
    assert slot.phase is Phase.FAILED


def test_a_rollback_tries_the_old_model_even_if_it_had_been_given_up() -> None:
    slot = replace(slot_in(State.LOADING), phase=Phase.FAILED, failures=9)
    step = advance(slot, core.WorkerFailed(NEW, "model.load_failed", "no"), NOW)
    assert step.slot.state is State.ROLLING_BACK
    assert StartWorker(OLD, "cpu", urgent=True) in step.effects
    down = advance(step.slot, core.WorkerExited(OLD, -9), NOW).slot
    assert (down.state, down.phase) == (State.DOWN, Phase.FAILED)


def test_want_of_memory_is_no_failure_of_the_model() -> None:
    slot = slot_in(State.ACTIVE)
    for _ in range(2 * service.MAX_FAILURES):
        slot = advance(replace(slot, phase=Phase.STARTING), core.WorkerFailed(NEW, "memory.busy", "no room"), NOW).slot
        assert slot.phase is Phase.BACKOFF
        assert slot.failures == 0


def test_the_reason_of_a_candidates_end_is_the_deployments() -> None:
    step = advance(slot_in(State.LOADING), OOM, NOW)
    assert (step.slot.error_code, step.slot.error_message) == (OOM.code, OOM.message)


def test_an_unload_says_why() -> None:
    step = advance(slot_in(State.ACTIVE), core.UnloadWanted("evicted"), NOW)
    assert [record.facts["reason"] for record in step.records] == ["evicted"]
