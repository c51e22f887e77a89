"""What a rollout does next. PURE: no clock, no I/O, no database; ``now`` is aware UTC.

A group's percentages refer to all its boards, a number frozen when the rollout starts. A group is in error when more
than ``error_threshold`` percent failed, once ``min_executed`` boards have ended; or when every board has ended and
fewer than ``success_threshold`` percent succeeded. A board that stayed silent past its timeout has ended without
success. No group begins before every group ahead of it has reached the success threshold.
Source: docs/operations.md, "Rollouts".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from garrison_controller.rollouts.states import GroupStatus, TargetState
from garrison_protocol.states import BEFORE_LOADING, DeploymentState


@dataclass(frozen=True, slots=True)
class Policy:
    """The conditions of one rollout. Thresholds are percent of a group's boards; times are seconds."""

    success_threshold: int
    error_threshold: int
    min_executed: int
    queued_timeout_s: int
    in_progress_timeout_s: int
    max_unavailable: int | None = None
    """How many boards of one group may change at the same time; None: all of them."""


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What is known of one board of a rollout."""

    device: str
    state: TargetState
    deployment: DeploymentState | None = None
    assigned_at: datetime | None = None
    started_at: datetime | None = None
    online: bool = False


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What is known of one group. ``accepted_failures`` were there when an operator resumed the rollout."""

    position: int
    name: str
    status: GroupStatus
    targets: tuple[TargetFacts, ...]
    accepted_failures: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """A group's boards by verdict."""

    total: int
    pending: int
    succeeded: int
    failed: int
    timed_out: int

    @property
    def executed(self) -> int:
        """Boards whose part has ended, well or badly."""
        return self.total - self.pending


@dataclass(frozen=True, slots=True)
class TimeOut:
    """These boards stayed silent too long."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartGroup:
    """The group begins."""

    position: int


@dataclass(frozen=True, slots=True)
class HandOut:
    """These boards receive the new desired state."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FinishGroup:
    """Every board of the group has ended and enough succeeded."""

    position: int


@dataclass(frozen=True, slots=True)
class FailGroup:
    """The group is in error and the rollout pauses."""

    position: int
    reason: str


@dataclass(frozen=True, slots=True)
class FinishRollout:
    """Every group has finished."""


Action = TimeOut | StartGroup | HandOut | FinishGroup | FailGroup | FinishRollout


def count(targets: Iterable[TargetFacts]) -> Counts:
    """Return how many boards stand where."""
    states = [target.state for target in targets]
    return Counts(
        total=len(states),
        pending=sum(state.pending for state in states),
        succeeded=states.count(TargetState.SUCCEEDED),
        failed=states.count(TargetState.FAILED),
        timed_out=states.count(TargetState.TIMED_OUT),
    )


def succeeded(policy: Policy, counts: Counts) -> bool:
    """Tell whether enough boards of a group succeeded. An empty group has."""
    return counts.succeeded * 100 >= policy.success_threshold * counts.total


def error(policy: Policy, group: GroupFacts) -> str | None:
    """Return why the group is in error, or None."""
    counts = count(group.targets)
    failures = counts.failed - group.accepted_failures
    enough = counts.executed >= min(policy.min_executed, counts.total)
    if failures > 0 and enough and failures * 100 > policy.error_threshold * counts.total:
        return (
            f"group {group.name}: {failures} of {counts.total} boards failed"
            f" (error threshold {policy.error_threshold} %)"
        )
    if not counts.pending and not succeeded(policy, counts):
        return (
            f"group {group.name}: {counts.succeeded} of {counts.total} boards succeeded, {counts.timed_out} timed out"
            f" (success threshold {policy.success_threshold} %)"
        )
    return None


def tick(policy: Policy, groups: Sequence[GroupFacts], now: datetime) -> tuple[Action, ...]:
    """Return what a *running* rollout does now, in order. Doing it and asking again at once returns nothing."""
    actions: list[Action] = []
    current = [_time_out(policy, group, now, actions) for group in groups]
    for place, group in enumerate(current):
        if group.status is GroupStatus.ERROR:
            actions.append(FailGroup(group.position, error(policy, group) or f"group {group.name} is in error"))
            return tuple(actions)
        if group.status is GroupStatus.FINISHED and _broke_later(policy, group, current):
            actions.append(FailGroup(group.position, error(policy, group) or f"group {group.name} is in error"))
            return tuple(actions)
        if group.status is not GroupStatus.RUNNING:
            continue
        reason = error(policy, group)
        if reason is not None:
            actions.append(FailGroup(group.position, reason))
            return tuple(actions)
        if not count(group.targets).pending:
            current[place] = _finish(group, actions)
    _start_next(policy, current, actions)
    for group in current:
        if group.status is GroupStatus.RUNNING:
            chosen = hand_out(policy, group)
            if chosen:
                actions.append(HandOut(chosen))
    if all(group.status is GroupStatus.FINISHED for group in current):
        actions.append(FinishRollout())
    return tuple(actions)


def hand_out(policy: Policy, group: GroupFacts) -> tuple[str, ...]:
    """Return the boards of a running group that may begin now: those online first, then by id.

    A board that is handed out and silent holds its slot until it times out, since it may begin at any moment; a board
    that is ``DOWN`` holds one because it serves nothing. One that was revoked holds none.
    """
    waiting = sorted((not one.online, one.device) for one in group.targets if one.state is TargetState.SCHEDULED)
    if policy.max_unavailable is None:
        return tuple(device for _, device in waiting)
    busy = sum(_holds_a_place(one) for one in group.targets)
    return tuple(device for _, device in waiting[: max(0, policy.max_unavailable - busy)])


def _holds_a_place(target: TargetFacts) -> bool:
    down = target.deployment is DeploymentState.DOWN and target.state is not TargetState.CANCELED
    return target.state.handed_out or down


def timed_out(policy: Policy, target: TargetFacts, now: datetime) -> bool:
    """Tell whether a board has stayed silent too long: before it began, or since it began."""
    if target.state is TargetState.QUEUED and target.assigned_at is not None:
        return now - target.assigned_at >= timedelta(seconds=policy.queued_timeout_s)
    if target.state is TargetState.IN_PROGRESS and target.started_at is not None:
        return now - target.started_at >= timedelta(seconds=policy.in_progress_timeout_s)
    return False


def withdrawable(target: TargetFacts) -> bool:
    """Tell whether the change can be taken back from the board without touching what it serves.

    A board that timed out may come back and go on with what it was handed. ``SUPERSEDED`` and ``REMOVED`` are what a
    board says of an earlier withdrawal until it sees that the change was handed to it again.
    """
    begun = target.deployment is not None and target.deployment not in BEFORE_LOADING | _NOT_BEGUN
    return (target.state.handed_out or target.state is TargetState.TIMED_OUT) and not begun


def verdict(state: TargetState, deployment: DeploymentState) -> TargetState:
    """Return the verdict on a board of an open rollout that now reports ``deployment`` for this very rollout.

    A board that was not handed out, or was withdrawn, keeps its state: its newer desired state overrides what it
    reports here. One that timed out may still succeed or fail. ``SUPERSEDED`` and ``REMOVED`` follow from the
    controller's own decisions and change nothing.
    """
    if state in {TargetState.SCHEDULED, TargetState.CANCELED}:
        return state
    if deployment is DeploymentState.ACTIVE:
        return TargetState.SUCCEEDED
    if deployment.failed:
        return TargetState.FAILED
    if state is TargetState.QUEUED and deployment not in _NOT_BEGUN:
        return TargetState.IN_PROGRESS
    return state


_NOT_BEGUN = frozenset(
    {DeploymentState.ASSIGNED, DeploymentState.WAITING, DeploymentState.SUPERSEDED, DeploymentState.REMOVED}
)


def _time_out(policy: Policy, group: GroupFacts, now: datetime, actions: list[Action]) -> GroupFacts:
    late = {one.device for one in group.targets if timed_out(policy, one, now)}
    if not late:
        return group
    actions.append(TimeOut(tuple(sorted(late))))
    targets = tuple(replace(one, state=TargetState.TIMED_OUT) if one.device in late else one for one in group.targets)
    return replace(group, targets=targets)


def _broke_later(policy: Policy, group: GroupFacts, groups: Sequence[GroupFacts]) -> bool:
    """Tell whether a finished group fell below its threshold while others wait, who could never begin behind it."""
    waiting = any(other.status is GroupStatus.SCHEDULED for other in groups)
    return waiting and not succeeded(policy, count(group.targets))


def _finish(group: GroupFacts, actions: list[Action]) -> GroupFacts:
    actions.append(FinishGroup(group.position))
    return replace(group, status=GroupStatus.FINISHED)


def _start_next(policy: Policy, current: list[GroupFacts], actions: list[Action]) -> None:
    for place, group in enumerate(current):
        if group.status is GroupStatus.SCHEDULED:
            actions.append(StartGroup(group.position))
            current[place] = replace(group, status=GroupStatus.RUNNING)
            if group.targets:
                return
            current[place] = _finish(group, actions)
        elif not succeeded(policy, count(group.targets)):
            return
