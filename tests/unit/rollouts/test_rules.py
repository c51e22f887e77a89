from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_controller.rollouts import rules
from garrison_controller.rollouts.rules import (
    FailGroup,
    FinishGroup,
    FinishRollout,
    GroupFacts,
    HandOut,
    Policy,
    StartGroup,
    TargetFacts,
    TimeOut,
)
from garrison_controller.rollouts.states import GroupStatus, TargetState
from garrison_protocol.states import BEFORE_LOADING, DeploymentState

NOW = datetime(2026, 11, 24, tzinfo=UTC)
POLICY = Policy(
    success_threshold=100, error_threshold=0, min_executed=1, queued_timeout_s=3600, in_progress_timeout_s=600
)


def group(status: GroupStatus, *states: TargetState, position: int = 0, accepted: int = 0) -> GroupFacts:
    targets = tuple(
        TargetFacts(f"b{place}", state, assigned_at=NOW, started_at=NOW) for place, state in enumerate(states)
    )
    return GroupFacts(position, f"g{position}", status, targets, accepted)


RUN, DUE, DONE = GroupStatus.RUNNING, GroupStatus.SCHEDULED, GroupStatus.FINISHED
S, Q, P, OK, BAD, LATE = (
    TargetState.SCHEDULED,
    TargetState.QUEUED,
    TargetState.IN_PROGRESS,
    TargetState.SUCCEEDED,
    TargetState.FAILED,
    TargetState.TIMED_OUT,
)


def test_the_first_group_starts_alone() -> None:
    actions = rules.tick(POLICY, [group(DUE, S, S), group(DUE, S, position=1)], NOW)
    assert actions == (StartGroup(0), HandOut(("b0", "b1")))


def test_the_next_group_waits_for_the_success_threshold() -> None:
    groups = [group(RUN, OK, P), group(DUE, S, position=1)]
    assert rules.tick(POLICY, groups, NOW) == ()
    assert rules.tick(replace(POLICY, success_threshold=50), groups, NOW) == (StartGroup(1), HandOut(("b0",)))


def test_a_complete_group_below_its_threshold_never_advances() -> None:
    policy = replace(POLICY, success_threshold=80, error_threshold=50)
    actions = rules.tick(policy, [group(RUN, OK, OK, OK, BAD), group(DUE, S, position=1)], NOW)
    assert actions == (FailGroup(0, "group g0: 3 of 4 boards succeeded, 0 timed out (success threshold 80 %)"),)


def test_one_failure_pauses_when_none_is_allowed() -> None:
    (action,) = rules.tick(POLICY, [group(RUN, BAD, P, P)], NOW)
    assert isinstance(action, FailGroup)
    assert "1 of 3 boards failed" in action.reason


def test_a_failure_at_the_error_threshold_is_allowed() -> None:
    policy = replace(POLICY, error_threshold=50, success_threshold=50)
    assert rules.tick(policy, [group(RUN, BAD, OK)], NOW) == (FinishGroup(0), FinishRollout())


def test_min_executed_guards_percentages_of_few() -> None:
    policy = replace(POLICY, error_threshold=10, min_executed=3)
    assert rules.tick(policy, [group(RUN, BAD, OK, P, P)], NOW) == ()
    (action,) = rules.tick(policy, [group(RUN, BAD, OK, OK, P)], NOW)
    assert isinstance(action, FailGroup)


def test_min_executed_never_exceeds_the_group() -> None:
    (action,) = rules.tick(replace(POLICY, min_executed=50), [group(RUN, BAD, BAD)], NOW)
    assert isinstance(action, FailGroup)


def test_accepted_failures_do_not_pause_again() -> None:
    policy = replace(POLICY, success_threshold=50)
    assert rules.tick(policy, [group(RUN, BAD, P, P, accepted=1)], NOW) == ()
    (action,) = rules.tick(policy, [group(RUN, BAD, BAD, P, accepted=1)], NOW)
    assert isinstance(action, FailGroup)


@pytest.mark.parametrize(("state", "limit_s"), [(Q, 3600), (P, 600)])
def test_silent_boards_time_out_separately(state: TargetState, limit_s: int) -> None:
    running = group(RUN, state, OK)
    assert rules.tick(POLICY, [running], NOW + timedelta(seconds=limit_s - 1)) == ()
    timed_out, failed = rules.tick(POLICY, [running], NOW + timedelta(seconds=limit_s))
    assert timed_out == TimeOut(("b0",))
    assert isinstance(failed, FailGroup)
    assert "1 timed out" in failed.reason


def test_a_timed_out_board_counts_as_not_successful_but_not_as_failed() -> None:
    policy = replace(POLICY, success_threshold=50)
    assert rules.tick(policy, [group(RUN, LATE, OK)], NOW) == (FinishGroup(0), FinishRollout())


def test_max_unavailable_bounds_simultaneous_change() -> None:
    policy = replace(POLICY, max_unavailable=2)
    assert rules.tick(policy, [group(DUE, S, S, S)], NOW) == (StartGroup(0), HandOut(("b0", "b1")))
    assert rules.tick(policy, [group(RUN, OK, P, S)], NOW) == (HandOut(("b2",)),)
    assert rules.tick(policy, [group(RUN, Q, P, S)], NOW) == ()


def test_a_board_that_is_down_holds_its_slot() -> None:
    policy = replace(POLICY, max_unavailable=1, error_threshold=50)
    facts = group(RUN, BAD, S)
    down = replace(facts.targets[0], deployment=DeploymentState.DOWN)
    assert rules.tick(policy, [facts], NOW) == (HandOut(("b1",)),)
    assert rules.tick(policy, [replace(facts, targets=(down, facts.targets[1]))], NOW) == ()


def test_boards_online_come_first() -> None:
    facts = group(RUN, S, S)
    online = replace(facts.targets[1], online=True)
    policy = replace(POLICY, max_unavailable=1)
    assert rules.hand_out(policy, replace(facts, targets=(facts.targets[0], online))) == ("b1",)


def test_a_finished_group_that_breaks_later_pauses_a_rollout_that_could_never_go_on() -> None:
    broken = group(DONE, BAD, OK)
    (action,) = rules.tick(POLICY, [broken, group(RUN, P, position=1), group(DUE, S, position=2)], NOW)
    assert isinstance(action, FailGroup)
    assert action.position == 0
    assert rules.tick(POLICY, [broken, group(RUN, P, position=1)], NOW) == ()  # nobody waits behind it


def test_empty_groups_finish_at_once() -> None:
    assert rules.tick(POLICY, [group(DUE), group(DUE, S, position=1)], NOW) == (
        StartGroup(0),
        FinishGroup(0),
        StartGroup(1),
        HandOut(("b0",)),
    )


def test_the_rollout_finishes_with_its_last_group() -> None:
    assert rules.tick(POLICY, [group(DONE, OK), group(RUN, OK, position=1)], NOW) == (FinishGroup(1), FinishRollout())


@given(
    st.lists(st.sampled_from(list(TargetState)), min_size=1, max_size=8),
    st.integers(1, 100),
    st.integers(0, 100),
    st.integers(1, 9),
)
def test_no_group_ever_starts_behind_one_below_its_threshold(
    states: list[TargetState], success: int, error: int, min_executed: int
) -> None:
    policy = replace(POLICY, success_threshold=success, error_threshold=error, min_executed=min_executed)
    actions = rules.tick(policy, [group(RUN, *states), group(DUE, S, position=1)], NOW)
    if states.count(OK) * 100 < success * len(states):
        assert StartGroup(1) not in actions


@pytest.mark.parametrize("deployment", list(DeploymentState))
def test_only_boards_before_loading_can_be_taken_back(deployment: DeploymentState) -> None:
    target = TargetFacts("b0", P, deployment)
    ended_by_an_earlier_withdrawal = deployment in {DeploymentState.SUPERSEDED, DeploymentState.REMOVED}
    expected = deployment in BEFORE_LOADING or ended_by_an_earlier_withdrawal
    assert rules.withdrawable(target) == expected
    assert rules.withdrawable(replace(target, state=LATE)) == expected
    assert not rules.withdrawable(replace(target, state=OK))


@pytest.mark.parametrize(
    ("state", "deployment", "expected"),
    [
        (Q, DeploymentState.ASSIGNED, Q),
        (Q, DeploymentState.WAITING, Q),
        (Q, DeploymentState.SUPERSEDED, Q),
        (Q, DeploymentState.DOWNLOADING, P),
        (P, DeploymentState.WAITING, P),
        (P, DeploymentState.SOAKING, P),
        (P, DeploymentState.ROLLING_BACK, P),
        (P, DeploymentState.ACTIVE, OK),
        (P, DeploymentState.ROLLED_BACK, BAD),
        (Q, DeploymentState.REJECTED, BAD),
        (P, DeploymentState.FAILED, BAD),
        (P, DeploymentState.DOWN, BAD),
        (OK, DeploymentState.REPAIRING, OK),
        (OK, DeploymentState.DOWN, BAD),
        (LATE, DeploymentState.DOWNLOADING, LATE),
        (LATE, DeploymentState.ACTIVE, OK),
        (S, DeploymentState.ACTIVE, S),
        (TargetState.CANCELED, DeploymentState.ACTIVE, TargetState.CANCELED),
    ],
)
def test_verdicts(state: TargetState, deployment: DeploymentState, expected: TargetState) -> None:
    assert rules.verdict(state, deployment) is expected
