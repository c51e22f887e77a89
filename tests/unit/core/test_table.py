"""Every state with every event: the table of the deployment machine, written down a second time."""

from __future__ import annotations

import pytest

from garrison_agent.core import slot as core
from garrison_agent.core.deployment import advance
from garrison_agent.core.slot import Phase, UnexpectedEventError
from garrison_protocol.states import DeploymentState as State
from tests.unit.core.slots import NEW, NOW, OLD, SUMMARY, THIRD, entry, events, slot_in

STAYS = "stays"
# By state: where events lead. An event that a row does not name is a bug there and ends the process.
TABLE: dict[State, dict[str, str]] = {
    State.ASSIGNED: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited nudged served served_enough restart_due "
            "load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
        "DOWNLOADING": "resolved",
        "WAITING": "must_wait",
        "REJECTED": "unsuitable",
        "FAILED": "job_failed",
    },
    State.WAITING: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited served served_enough restart_due "
            "load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other timer_due nudged",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
    },
    State.DOWNLOADING: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited nudged served served_enough restart_due "
            "load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
        "VERIFYING": "downloaded",
        "WAITING": "must_wait",
        "FAILED": "job_failed",
    },
    State.VERIFYING: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited nudged served served_enough restart_due "
            "load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
        "STAGED": "files_verified",
        "WAITING": "must_wait",
        "FAILED": "job_failed",
    },
    State.STAGED: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited nudged served served_enough restart_due "
            "load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
        "LOADING": "placed",
        "WAITING": "must_wait",
        "REJECTED": "unsuitable",
        "FAILED": "job_failed",
    },
    State.LOADING: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited nudged served served_enough restart_due "
            "load_wanted unload_wanted"
        ),
        "LOADING": "assign_new_rollout",
        "ROLLING_BACK": "assign_other assign_old candidate_failed candidate_exited timer_due",
        "REMOVED": "withdraw",
        "EVALUATING": "candidate_ready",
    },
    State.EVALUATING: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited nudged served served_enough restart_due "
            "load_wanted unload_wanted"
        ),
        "EVALUATING": "assign_new_rollout",
        "ROLLING_BACK": ("assign_other assign_old not_passed job_failed candidate_failed candidate_exited timer_due"),
        "REMOVED": "withdraw",
        "SOAKING": "passed",
    },
    State.SOAKING: {
        "stays": ("assign_same candidate_exited serving_exited nudged served restart_due load_wanted unload_wanted"),
        "SOAKING": "assign_new_rollout",
        "ROLLING_BACK": "assign_other assign_old candidate_failed serving_failed serving_corrupt",
        "REMOVED": "withdraw",
        "ACTIVE": "served_enough",
    },
    State.ACTIVE: {
        "stays": (
            "assign_same candidate_failed candidate_exited serving_failed serving_exited proceeded nudged served "
            "served_enough restart_due load_wanted unload_wanted"
        ),
        "ACTIVE": "assign_new_rollout",
        "ASSIGNED": "assign_other assign_old",
        "REMOVED": "withdraw",
        "REPAIRING": "serving_corrupt",
    },
    State.REPAIRING: {
        "stays": (
            "assign_same nudged served served_enough restart_due repaired repair_failed load_wanted unload_wanted"
        ),
        "REPAIRING": "assign_new_rollout",
        "ASSIGNED": "assign_other assign_old",
        "REMOVED": "withdraw",
    },
    State.FAILED: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited proceeded nudged served served_enough "
            "restart_due load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
    },
    State.ROLLING_BACK: {
        "stays": (
            "assign_same assign_new_rollout assign_other assign_old proceeded nudged served served_enough "
            "load_wanted unload_wanted"
        ),
        "REMOVED": "withdraw",
        "ROLLED_BACK": "serving_ready",
        "DOWN": "serving_failed serving_corrupt serving_exited restart_due",
    },
    State.ROLLED_BACK: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited proceeded nudged served served_enough "
            "restart_due load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
    },
    State.DOWN: {
        "stays": "assign_same proceeded nudged served served_enough restart_due load_wanted unload_wanted",
        "ASSIGNED": "assign_new_rollout assign_other assign_old",
        "REMOVED": "withdraw",
    },
    State.REJECTED: {
        "stays": (
            "assign_same serving_failed serving_corrupt serving_exited proceeded nudged served served_enough "
            "restart_due load_wanted unload_wanted"
        ),
        "ASSIGNED": "assign_new_rollout assign_other",
        "ACTIVE": "assign_old",
        "REMOVED": "withdraw",
    },
    State.REMOVED: {
        "ASSIGNED": "assign_same assign_new_rollout assign_other assign_old",
        "stays": (
            "withdraw serving_ready serving_failed serving_corrupt serving_exited nudged served served_enough "
            "restart_due load_wanted unload_wanted"
        ),
    },
}

PAIRS = [(state, name) for state in TABLE for name in events(slot_in(state))]


@pytest.mark.parametrize(("state", "name"), PAIRS)
def test_every_pair(state: State, name: str) -> None:
    slot = slot_in(state)
    expected = next((to for to, names in TABLE[state].items() if name in names.split()), None)
    if expected is None:
        with pytest.raises(UnexpectedEventError):
            advance(slot, events(slot)[name], NOW)
        return
    step = advance(slot, events(slot)[name], NOW)
    if expected == STAYS:
        assert (step.slot.state, step.slot.step) == (slot.state, slot.step)
    else:
        assert step.slot.state.value == expected
        assert step.slot.step > slot.step
        assert any(record.kind == f"deployment.{expected.lower()}" for record in step.records)


@pytest.mark.parametrize("state", TABLE)
def test_events_of_the_past_change_nothing(state: State) -> None:
    slot = slot_in(state)
    old: list[core.Event] = [
        core.Resolved(slot.attempt - 1, "cpu", 1),
        core.Downloaded(slot.attempt - 1),
        core.JobFailed(slot.attempt - 1, "x.y", "z"),
        core.Evaluated(slot.attempt - 1, SUMMARY),
        core.TimerDue(slot.step - 1),
        core.Proceeded(slot.step - 1),
        core.RestartDue(slot.turn - 1),
        core.Repaired(slot.turn - 1),
        core.WorkerReady(THIRD),
        core.WorkerExited(THIRD, 1),
    ]
    for event in old:
        step = advance(slot, event, NOW)
        assert step.slot == slot
        assert step.effects == ()


@pytest.mark.parametrize("state", [State.ASSIGNED, State.DOWNLOADING, State.VERIFYING, State.STAGED])
def test_a_failure_before_loading_never_stops_the_old_model(state: State) -> None:
    slot = slot_in(state)
    step = advance(slot, core.JobFailed(slot.attempt, "download.digest_mismatch", "wrong bytes"), NOW)
    assert step.slot.state is State.FAILED
    assert step.slot.error_code == "download.digest_mismatch"
    assert step.slot.phase is Phase.READY
    assert not any(isinstance(effect, core.StopWorker) for effect in step.effects)


def test_instead_unloads_the_old_model_before_the_candidate_is_loaded() -> None:
    slot = slot_in(State.STAGED)
    step = advance(slot, core.Placed(slot.attempt, beside=False), NOW)
    kinds = [effect for effect in step.effects if isinstance(effect, core.StopWorker | core.StartWorker)]
    assert kinds == [core.StopWorker(OLD), core.StartWorker(NEW, "cpu")]


def test_the_alias_switches_on_entering_soaking() -> None:
    slot = slot_in(State.EVALUATING)
    step = advance(slot, core.Evaluated(slot.attempt, SUMMARY), NOW)
    assert step.slot.serving is not None
    assert step.slot.previous is not None
    assert (step.slot.serving.package, step.slot.previous.package) == (NEW, OLD)
    assert core.StopWorker(OLD) in step.effects


def test_a_model_that_is_rolled_back_has_no_time_for_its_answers() -> None:
    slot = slot_in(State.SOAKING)
    step = slot
    for _ in range(10):
        result = advance(step, core.WorkerExited(NEW, 1, "worker.crashed", "again"), NOW)
        if result.slot.state is State.ROLLING_BACK:
            break
        step = advance(result.slot, core.RestartDue(result.slot.turn), NOW).slot
    assert core.StopWorker(NEW, drain=False) in result.effects


def test_without_a_model_before_it_a_rollback_leaves_the_alias_empty() -> None:
    slot = slot_in(State.EVALUATING, old=False)
    step = advance(slot, core.Evaluated(slot.attempt, SUMMARY, "gate.accuracy", "worse"), NOW)
    assert step.slot.state is State.ROLLING_BACK
    step = advance(step.slot, core.Proceeded(step.slot.step), NOW)
    assert step.slot.state is State.ROLLED_BACK
    assert step.slot.serving is None


def test_the_second_crash_in_the_soak_is_one_too_many() -> None:
    slot = slot_in(State.SOAKING)
    step = advance(slot, core.WorkerExited(NEW, -11), NOW)
    assert step.slot.state is State.SOAKING
    step = advance(step.slot, core.RestartDue(step.slot.turn), NOW)
    step = advance(step.slot, core.WorkerReady(NEW), NOW)
    step = advance(step.slot, core.WorkerExited(NEW, -11), NOW)
    assert step.slot.state is State.ROLLING_BACK
    assert step.slot.error_code == "soak.crashed"
    assert step.slot.serving is not None
    assert step.slot.serving.package == OLD


def test_what_failed_is_not_tried_again_under_the_same_rollout() -> None:
    for state in (State.FAILED, State.REJECTED, State.ROLLED_BACK, State.ACTIVE):
        slot = slot_in(state)
        step = advance(slot, core.Assign(entry(NEW, "r2", soak_s=99)), NOW)
        assert (step.slot.state, step.effects) == (state, ())


def test_a_package_that_serves_already_is_active_at_once_under_the_new_rollout() -> None:
    step = advance(slot_in(State.ROLLED_BACK), core.Assign(entry(OLD, "r9")), NOW)
    assert (step.slot.state, step.slot.rollout, step.slot.package) == (State.ACTIVE, "r9", OLD)
    assert step.effects == ()
    assert step.slot.error_code is None


def test_newer_desired_state_from_loading_on_goes_through_a_rollback() -> None:
    step = advance(slot_in(State.LOADING), core.Assign(entry(THIRD, "r3")), NOW)
    assert step.slot.state is State.ROLLING_BACK
    step = advance(step.slot, core.Proceeded(step.slot.step), NOW)
    assert step.slot.state is State.ROLLED_BACK
    assert core.Proceed(step.slot.step) in step.effects
    step = advance(step.slot, core.Proceeded(step.slot.step), NOW)
    assert (step.slot.state, step.slot.package) == (State.ASSIGNED, THIRD)


def test_the_same_rollout_wanted_again_during_its_own_superseding_begins_anew() -> None:
    step = advance(slot_in(State.LOADING), core.Assign(entry(THIRD, "r3")), NOW)
    step = advance(step.slot, core.Assign(entry(NEW, "r2")), NOW)
    step = advance(step.slot, core.Proceeded(step.slot.step), NOW)
    step = advance(step.slot, core.Proceeded(step.slot.step), NOW)
    assert (step.slot.state, step.slot.package, step.slot.error_code) == (State.ASSIGNED, NEW, None)


def test_start_by_ends_a_deployment_that_comes_too_late() -> None:
    late = entry(NEW, "r5", start_by=int(NOW.wall_s) - 1)
    step = advance(slot_in(State.ACTIVE), core.Assign(entry(THIRD, "r4")), NOW)
    step = advance(step.slot, core.Assign(late.model_copy(update={"package": OLD})), NOW)
    step = advance(step.slot, core.Resolved(step.slot.attempt, "cpu", 1), NOW)
    assert (step.slot.state, step.slot.error_code) == (State.FAILED, "deployment.too_late")


def test_a_soak_of_zero_ends_with_the_first_tick() -> None:
    slot = slot_in(State.EVALUATING)
    step = advance(slot, core.Assign(entry(NEW, "r2", soak_s=0)), NOW)
    step = advance(step.slot, core.Evaluated(step.slot.attempt, SUMMARY), NOW)
    assert step.slot.state is State.SOAKING
    assert advance(step.slot, core.Served(0.0), NOW).slot.state is State.ACTIVE


def test_not_to_stay_loaded_is_obeyed_after_the_soak_and_by_changes_of_desired_state() -> None:
    slot = slot_in(State.SOAKING)
    step = advance(slot, core.Assign(entry(NEW, "r2", loaded=False)), NOW)
    step = advance(step.slot, core.Served(99.0), NOW)
    assert (step.slot.state, step.slot.phase) == (State.ACTIVE, Phase.OFF)
    assert core.StopWorker(NEW) in step.effects
    step = advance(step.slot, core.Assign(entry(NEW, "r2", loaded=True)), NOW)
    assert step.slot.phase is Phase.STARTING


def test_a_repair_waits_longer_each_time_it_fails() -> None:
    step = advance(slot_in(State.ACTIVE), core.WorkerFailed(NEW, "model.digest_mismatch", "flipped"), NOW)
    delays = []
    for _ in range(4):
        step = advance(step.slot, core.RepairFailed(step.slot.turn, "source.unreachable", "no network"), NOW)
        delays += [effect.delay_s for effect in step.effects if isinstance(effect, core.SetRestart)]
        step = advance(step.slot, core.RestartDue(step.slot.turn), NOW)
        assert any(isinstance(effect, core.Repair) for effect in step.effects)
    assert delays == sorted(set(delays))
    step = advance(step.slot, core.Repaired(step.slot.turn, 1), NOW)
    step = advance(step.slot, core.WorkerReady(NEW), NOW)
    assert step.slot.state is State.ACTIVE


def test_a_worker_that_was_steady_is_restarted_soon() -> None:
    slot = slot_in(State.ACTIVE)
    step = advance(slot, core.WorkerExited(NEW, -9), NOW)
    first = step.slot.failures
    for _ in range(3):
        step = advance(step.slot, core.RestartDue(step.slot.turn), NOW)
        step = advance(step.slot, core.WorkerExited(NEW, -9), NOW)
    assert step.slot.failures == first + 3
    step = advance(step.slot, core.RestartDue(step.slot.turn), NOW)
    step = advance(step.slot, core.WorkerReady(NEW), NOW)
    later = core.Now(NOW.wall_s, NOW.monotonic_s + 3600)
    assert advance(step.slot, core.WorkerExited(NEW, -9), later).slot.failures == 1
