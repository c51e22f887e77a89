"""What a board's report says about rollouts. Runs inside the caller's transaction."""

from __future__ import annotations

import json
from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.rollouts import rules
from garrison_controller.rollouts.states import RolloutStatus, TargetState
from garrison_controller.rollouts.tables import Assignment, Rollout, Target
from garrison_protocol.messages.report import AliasReport

MAX_MESSAGE_LENGTH = 2000
MAX_CODE_LENGTH = 128


def record(session: Session, device: str, report: AliasReport, now: datetime) -> Rollout | None:
    """Record one alias of a board's newest report; return the rollout whose verdict on the board changed, if any.

    A report about an unknown rollout, another alias, or an older step changes nothing. Once the rollout has ended
    only the board's own word is kept, not the verdict.
    """
    rollout = session.get(Rollout, report.rollout)
    if rollout is not None and RolloutStatus(rollout.status).open:
        # Locked before the target is read, so that the tick of another controller cannot decide meanwhile.
        rollout = session.get(Rollout, report.rollout, with_for_update=True)
    target = session.get(Target, (report.rollout, device))
    if rollout is None or target is None or rollout.alias != report.alias or report.step < target.step:
        return None
    target.heard_at, target.step, target.deployment = now, report.step, report.state.value
    target.variant = _clean(report.variant, MAX_CODE_LENGTH)
    target.progress_bytes, target.total_bytes = report.progress_bytes, report.total_bytes
    if report.evaluation is not None:
        # Through JSON text, where NaN and infinity become null: no database or client has to take them.
        target.evaluation = json.loads(report.evaluation.model_dump_json())
    if not RolloutStatus(rollout.status).open:
        return None
    before = TargetState(target.state)
    after = rules.verdict(before, report.state)
    if before is TargetState.TIMED_OUT and not _assigned(session, device, rollout):
        after = before  # withdrawn since: it is on its way back
    if before is not TargetState.TIMED_OUT or after is not before:
        target.error_code = _clean(report.error_code, MAX_CODE_LENGTH)
        target.message = _clean(report.error_message, MAX_MESSAGE_LENGTH)
    if after is before:
        return None
    target.state = after
    if after is TargetState.IN_PROGRESS:
        target.started_at = now
    else:
        target.finished_at = now
    if after is TargetState.SUCCEEDED:
        _no_deadline(session, device, rollout)
    return rollout


def _no_deadline(session: Session, device: str, rollout: Rollout) -> None:
    """A board that succeeded may have to begin this again at any time, should it lose its store."""
    assignment = _assigned(session, device, rollout)
    if assignment is not None:
        assignment.start_by = None


def _assigned(session: Session, device: str, rollout: Rollout) -> Assignment | None:
    """Return what the board should serve, if that is this rollout's."""
    assignment = session.get(Assignment, (device, rollout.alias))
    return assignment if assignment is not None and assignment.rollout_id == rollout.id else None


def _clean(text: str | None, length: int) -> str | None:
    """Return text that every database takes: PostgreSQL refuses NUL."""
    return None if text is None else text.replace("\x00", "\N{REPLACEMENT CHARACTER}")[:length]
