"""A board leaves its rollouts, or begins anew under another identity. Runs inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.rollouts import desired, execution
from garrison_controller.rollouts.states import RolloutStatus, TargetState
from garrison_controller.rollouts.tables import Assignment, DesiredState, Rollout, Target
from garrison_protocol.keys import SigningKey

REVOKED = "device.revoked"


def leave(session: Session, device: str, now: datetime) -> None:
    """End the part of a revoked board in every open rollout, without success; whoever waits for its place may begin.

    What it should have changed to is taken back, for a board that may take over its name. Nothing is signed.
    """
    for target in _pending(session, device):
        target.state, target.finished_at = TargetState.CANCELED, now
        target.error_code, target.message = REVOKED, "the board was revoked"
    _go_back(session, device)


def begin_anew(session: Session, device: str, director: SigningKey, now: datetime) -> None:
    """Hand a board that took over a name what its predecessor last served well; sign that for it.

    Rollouts that had handed something out hand it out again. The new counter lies above every earlier one, and the
    board's own counts begin at 1.
    """
    for target in _pending(session, device):
        target.state, target.deployment = TargetState.SCHEDULED, None
        target.assigned_at = target.started_at = None
    for target in session.scalars(select(Target).where(Target.device_id == device)):
        target.step = 0
    _go_back(session, device)
    session.flush()
    signed = session.get(DesiredState, device)
    if signed is not None and max(signed.counter, signed.counter_floor) > 0:
        desired.issue(session, (device,), director, now)


def _pending(session: Session, device: str) -> Iterator[Target]:
    """Return the board's rows in open rollouts that have not ended; each rollout stays locked, in one order."""
    open_states = [status for status in RolloutStatus if status.open]
    ids = session.scalars(
        select(Rollout.id)
        .join(Target, Target.rollout_id == Rollout.id)
        .where(Target.device_id == device, Rollout.status.in_(open_states))
        .order_by(Rollout.id)
    ).all()
    for rollout_id in ids:
        rollout = session.get_one(Rollout, rollout_id, with_for_update=True)
        target = session.get_one(Target, (rollout_id, device), with_for_update=True)
        if RolloutStatus(rollout.status).open and TargetState(target.state).pending:
            yield target


def _go_back(session: Session, device: str) -> None:
    session.flush()
    for assignment in session.scalars(select(Assignment).where(Assignment.device_id == device)).all():
        desired.assign(session, device, assignment.alias, execution.to_go_back_to(session, assignment))
