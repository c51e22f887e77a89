"""Leases: when they end, what that stops, and what alone renews them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from garrison_agent.core.deployment import advance, resume
from garrison_agent.core.lease import DAY_S, Standing, changes
from garrison_agent.core.slot import (
    Evaluated,
    Lapse,
    LeaseEnded,
    LeaseRenewed,
    LoadWanted,
    Phase,
    Proceeded,
    Repaired,
    Slot,
    StartWorker,
    StopWorker,
    WorkerExited,
    WorkerReady,
)
from garrison_protocol.manifest import Lease
from garrison_protocol.states import DeploymentState as State
from tests.unit.core.slots import NOW, OLD, SUMMARY, slot_in

FRESH_AT_S = 1_800_000_000.0
STOP, WARN = Lease(days=2, on_expiry="stop"), Lease(days=2)
SERVING = [state for state in State if slot_in(state).serving is not None and state is not State.SUPERSEDED]


def ended(slot: Slot, *, stops: bool = True) -> Slot:
    assert slot.serving is not None
    event = LeaseEnded(slot.serving.package, stops=stops, fresh_at_s=FRESH_AT_S)
    return advance(slot, event, NOW).slot


def test_a_lease_counts_from_the_last_fresh_metadata() -> None:
    assert not Standing(STOP, FRESH_AT_S, FRESH_AT_S + 2 * DAY_S).ended
    assert Standing(STOP, FRESH_AT_S, FRESH_AT_S + 2 * DAY_S + 1).ended


def test_it_ends_once() -> None:
    slot = slot_in(State.ACTIVE)
    late = {"fresh_at_s": FRESH_AT_S, "now_s": FRESH_AT_S + 3 * DAY_S}
    assert isinstance(changes({"chat": slot}, {"chat": WARN}, **late)["chat"], LeaseEnded)
    assert changes({"chat": ended(slot)}, {"chat": WARN}, **late) == {}
    assert changes({"chat": slot}, {"chat": None}, **late) == {}
    assert changes({"chat": slot}, {}, **late) == {}


def test_a_clock_that_is_put_back_renews_nothing() -> None:
    slot = ended(slot_in(State.ACTIVE))
    assert changes({"chat": slot}, {"chat": STOP}, fresh_at_s=FRESH_AT_S, now_s=FRESH_AT_S) == {}
    fresh = changes({"chat": slot}, {"chat": STOP}, fresh_at_s=FRESH_AT_S + 9 * DAY_S, now_s=FRESH_AT_S + 9 * DAY_S)
    assert isinstance(fresh["chat"], LeaseRenewed)


def test_a_lease_that_warns_stops_nothing() -> None:
    slot = slot_in(State.ACTIVE)
    step = advance(slot, LeaseEnded(slot.package, stops=False, fresh_at_s=FRESH_AT_S), NOW)
    assert (step.slot.lease_ended, step.slot.barred, step.slot.phase) == (True, False, Phase.READY)
    assert step.effects == ()
    assert [record.kind for record in step.records] == ["lease.ended"]


@pytest.mark.parametrize("state", SERVING)
def test_nothing_loads_what_may_not_serve(state: State) -> None:
    slot = ended(slot_in(state))
    assert slot.barred
    assert slot.phase in (Phase.OFF, Phase.REPAIRING)
    assert slot.serving is not None
    started = StartWorker(slot.serving.package, slot.serving.variant)
    assert started not in resume(slot).effects
    assert started not in advance(slot, LoadWanted(), NOW).effects


def test_it_loads_again_by_itself() -> None:
    slot = ended(slot_in(State.ACTIVE))
    step = advance(slot, LeaseRenewed(slot.package), NOW)
    assert StartWorker(slot.package, "cpu") in step.effects
    assert (step.slot.lease_ended, step.slot.phase) == (False, Phase.STARTING)


def test_a_lease_that_ends_hurries_what_was_unloaded_and_is_ending_its_answers() -> None:
    slot = slot_in(State.ACTIVE)
    slot = replace(slot, wanted=False, phase=Phase.OFF)
    step = advance(slot, LeaseEnded(slot.package, stops=True, fresh_at_s=FRESH_AT_S), NOW)
    assert step.effects == (StopWorker(slot.package, drain=False),)


def test_an_operator_who_unloaded_it_keeps_it_unloaded() -> None:
    slot = replace(ended(slot_in(State.ACTIVE)), wanted=False)
    assert advance(slot, LeaseRenewed(slot.package), NOW).effects == ()


def test_a_rollback_ends_although_the_old_model_may_not_serve() -> None:
    slot = slot_in(State.ROLLING_BACK)
    step = advance(slot, LeaseEnded(OLD, stops=True, fresh_at_s=FRESH_AT_S), NOW)
    assert StopWorker(OLD, drain=False) in step.effects
    after = advance(step.slot, Proceeded(step.slot.step), NOW).slot
    assert (after.state, after.phase) == (State.ROLLED_BACK, Phase.OFF)


def test_a_repair_goes_on_but_loads_nothing() -> None:
    slot = ended(slot_in(State.REPAIRING))
    after = advance(slot, Repaired(slot.turn, 3), NOW).slot
    assert (after.state, after.phase) == (State.ACTIVE, Phase.OFF)


def test_a_model_that_was_down_serves_after_its_renewal() -> None:
    slot = ended(slot_in(State.DOWN))
    assert slot.state is State.DOWN
    step = advance(slot, LeaseRenewed(OLD), NOW)
    assert StartWorker(OLD, "cpu") in step.effects
    assert advance(step.slot, WorkerReady(OLD), NOW).slot.state is State.ROLLED_BACK


def test_the_lease_of_another_package_changes_nothing() -> None:
    slot = slot_in(State.ACTIVE)
    assert advance(slot, LeaseEnded(OLD, stops=True, fresh_at_s=FRESH_AT_S), NOW).slot == slot


@pytest.mark.parametrize("state", [State.LOADING, State.EVALUATING])
def test_a_model_that_made_way_for_its_successor_does_not_load_beside_it(state: State) -> None:
    slot = ended(replace(slot_in(state), beside=False, phase=Phase.OFF))
    step = advance(slot, LeaseRenewed(OLD), NOW)
    assert (step.effects, step.slot.barred) == ((), False)
    rolled_back = advance(step.slot, WorkerExited(slot.package, 1), NOW)
    assert StartWorker(OLD, "cpu", urgent=True) in rolled_back.effects


def test_a_package_that_came_in_again_is_not_barred_by_its_earlier_lease() -> None:
    slot = slot_in(State.EVALUATING)
    slot = replace(slot, lapse=Lapse(slot.package, stops=True, fresh_at_s=FRESH_AT_S))
    step = advance(slot, Evaluated(slot.attempt, SUMMARY), NOW)
    assert step.slot.state is State.SOAKING
    assert not step.slot.lease_ended
    assert "lease.renewed" in [record.kind for record in step.records]
