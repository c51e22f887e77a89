"""The work of a rollout on its boards: doing what ``rules`` decided. Runs inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.events import record_event
from garrison_controller.rollouts import desired, queries, rules
from garrison_controller.rollouts.rules import (
    FailGroup,
    FinishGroup,
    FinishRollout,
    HandOut,
    Policy,
    StartGroup,
    TimeOut,
)
from garrison_controller.rollouts.states import GroupStatus, RolloutStatus, TargetState
from garrison_controller.rollouts.tables import Assignment, Rollout, RolloutGroup, Target
from garrison_protocol.errors import ConflictError
from garrison_protocol.keys import SigningKey

CONTROLLER = "controller"
"""Who acts in the record of events when the tick does."""


def policy_of(rollout: Rollout) -> Policy:
    """Return the rollout's conditions as the rules see them."""
    return Policy(
        success_threshold=rollout.success_threshold,
        error_threshold=rollout.error_threshold,
        min_executed=rollout.min_executed,
        queued_timeout_s=rollout.queued_timeout_s,
        in_progress_timeout_s=rollout.in_progress_timeout_s,
        max_unavailable=rollout.max_unavailable,
    )


def advance(session: Session, rollout: Rollout, director: SigningKey, now: datetime) -> bool:
    """Do what is due in a running rollout; return whether desired state changed."""
    if rollout.status != RolloutStatus.RUNNING:
        return False
    session.flush()
    changed = False
    for action in rules.tick(policy_of(rollout), queries.facts(session, rollout.id), now):
        match action:
            case TimeOut(devices):
                _time_out(session, rollout, devices, now)
            case StartGroup(position):
                _start_group(session, rollout, position, now)
            case HandOut(devices):
                _hand_out(session, rollout, devices, director, now)
                changed = True
            case FinishGroup(position):
                group = _group(session, rollout, position)
                group.status, group.finished_at = GroupStatus.FINISHED, now
            case FailGroup(position, reason):
                _group(session, rollout, position).status = GroupStatus.ERROR
                rollout.status, rollout.pause_reason = RolloutStatus.PAUSED, reason
                changed = bool(withdraw(session, rollout, director, now)) or changed
                record_event(session, now, CONTROLLER, "rollout.pause", rollout.name, detail={"reason": reason})
            case FinishRollout():
                rollout.status, rollout.finished_at = RolloutStatus.FINISHED, now
                record_event(session, now, CONTROLLER, "rollout.finish", rollout.name)
    return changed


def withdraw(session: Session, rollout: Rollout, director: SigningKey, now: datetime) -> list[str]:
    """Take the change back from boards that are not yet loading it, and return them.

    They count as not handed out, so that a resumed rollout hands the change to them again; those that timed out do not.
    """
    withdrawn = [
        target for target in queries.targets_of(session, rollout.id) if rules.withdrawable(queries.target_facts(target))
    ]
    for target in withdrawn:
        if target.state == TargetState.TIMED_OUT:
            continue
        target.state, target.assigned_at, target.started_at = TargetState.SCHEDULED, None, None
    return _restore(session, rollout, withdrawn, director, now)


def restore_unsuccessful(session: Session, rollout: Rollout, director: SigningKey, now: datetime) -> list[str]:
    """Give every board that did not succeed what it had before, and return those that change."""
    targets = [one for one in queries.targets_of(session, rollout.id) if one.state != TargetState.SUCCEEDED]
    for target in targets:
        if TargetState(target.state).pending:
            target.state, target.finished_at = TargetState.CANCELED, now
    return _restore(session, rollout, targets, director, now)


def accept_failures(session: Session, rollout: Rollout) -> None:
    """Let groups in error go on: failures so far no longer count towards the error threshold.

    Raises:
        ConflictError: ``rollout.group_failed`` when every board of a group has ended below the success threshold.
    """
    policy = policy_of(rollout)
    for group in queries.facts(session, rollout.id):
        counts = rules.count(group.targets)
        if group.status is not GroupStatus.ERROR:
            continue
        if not counts.pending and not rules.succeeded(policy, counts):
            raise ConflictError(
                "rollout.group_failed",
                f"every board of group {group.name} has ended and {counts.succeeded} of {counts.total} succeeded",
                hint=f"`garrison rollout stop {rollout.name}`, then create a rollout with a model that works",
                rollout=rollout.id,
                group=group.name,
            )
        row = _group(session, rollout, group.position)
        row.status, row.accepted_failures = GroupStatus.RUNNING, counts.failed


def start_next_group(session: Session, rollout: Rollout, now: datetime) -> str:
    """Begin the first group that has not begun, and return its name.

    Raises:
        ConflictError: ``rollout.no_next_group``.
    """
    for group in queries.groups_of(session, rollout.id):
        if group.status == GroupStatus.SCHEDULED:
            _start_group(session, rollout, group.position, now)
            return group.name
    raise ConflictError(
        "rollout.no_next_group",
        f"every group of {rollout.name} has begun",
        hint=f"see `garrison rollout show {rollout.name}`",
    )


def _group(session: Session, rollout: Rollout, position: int) -> RolloutGroup:
    return session.get_one(RolloutGroup, (rollout.id, position))


def _start_group(session: Session, rollout: Rollout, position: int, now: datetime) -> None:
    group = _group(session, rollout, position)
    group.status, group.started_at = GroupStatus.RUNNING, now


def _time_out(session: Session, rollout: Rollout, devices: Iterable[str], now: datetime) -> None:
    for device in devices:
        target = session.get_one(Target, (rollout.id, device))
        begun = target.state == TargetState.IN_PROGRESS
        target.state, target.finished_at = TargetState.TIMED_OUT, now
        target.error_code = "rollout.in_progress_timeout" if begun else "rollout.queued_timeout"
        target.message = "the board began and did not end in time" if begun else "the board did not begin in time"


def _hand_out(
    session: Session, rollout: Rollout, devices: tuple[str, ...], director: SigningKey, now: datetime
) -> None:
    start_by = int((now + timedelta(seconds=rollout.queued_timeout_s)).timestamp())
    for device in devices:
        target = session.get_one(Target, (rollout.id, device))
        current = session.get(Assignment, (device, rollout.alias))
        if current is None or current.rollout_id != rollout.id:
            target.previous = to_go_back_to(session, current)
        values: dict[str, object] = {
            "package_name": rollout.package_name,
            "package_version": rollout.package_version,
            "manifest_sha256": rollout.manifest_sha256,
            "rollout_id": rollout.id,
            "soak_s": rollout.soak_s,
            "limits": rollout.limits,
            "start_by": start_by,
            "loaded": True,
        }
        desired.assign(session, device, rollout.alias, values)
        target.state, target.assigned_at = TargetState.QUEUED, now
        target.error_code = target.message = None
    desired.issue(session, devices, director, now)


def to_go_back_to(session: Session, current: Assignment | None) -> dict[str, object]:
    """Return what to restore later: the current assignment, or what lies before it if that never succeeded here."""
    if current is None:
        return {}
    earlier = session.get(Target, (current.rollout_id, current.device_id))
    if earlier is None or earlier.state == TargetState.SUCCEEDED:
        return desired.to_document(current)
    return dict(earlier.previous)


def _restore(
    session: Session, rollout: Rollout, targets: list[Target], director: SigningKey, now: datetime
) -> list[str]:
    session.flush()
    ours = set(
        session.scalars(
            select(Assignment.device_id).where(Assignment.rollout_id == rollout.id, Assignment.alias == rollout.alias)
        )
    )
    restored = [target for target in targets if target.device_id in ours]
    for target in restored:
        desired.assign(session, target.device_id, rollout.alias, dict(target.previous))
    devices = [target.device_id for target in restored]
    desired.issue(session, devices, director, now)
    return devices
