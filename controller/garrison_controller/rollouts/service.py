"""Use cases of rollouts. Each runs inside the caller's transaction and locks the rollout that it changes.

Where desired state changed, the caller tells the bus after the commit (``Bus.desired_changed``).
"""

from __future__ import annotations

import logging
import secrets
from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.access import rules as access_rules
from garrison_controller.access.events import record_event
from garrison_controller.access.service import Identified
from garrison_controller.db.base import Database
from garrison_controller.devices.filter import parse_filter
from garrison_controller.rollouts import execution, queries
from garrison_controller.rollouts.specification import RolloutSpec, digest
from garrison_controller.rollouts.states import Decision, GroupStatus, RolloutStatus, TargetState
from garrison_controller.rollouts.tables import Approval, Rollout, RolloutGroup, Target
from garrison_protocol.errors import ConflictError, DeniedError, RefusedError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.desired import MAX_ALIASES

_LOG = logging.getLogger(__name__)


def create(session: Session, actor: Identified, spec: RolloutSpec, now: datetime) -> Rollout:
    """Add a rollout that waits for approval.

    Raises:
        NotFoundError: ``model.unknown``.
        InvalidError: ``filter.malformed`` or ``access.scope_malformed``.
        ConflictError: ``rollout.exists``.
    """
    access_rules.check_scope(spec.scope)
    for text in (spec.target_filter, *(group.filter or "" for group in spec.groups)):
        parse_filter(text)
    package = queries.package(session, spec.model, spec.version)
    if any(spec.name in {rollout.name, rollout.id} for rollout in queries.all_rollouts(session)):
        raise ConflictError("rollout.exists", f"a rollout {spec.name} exists", hint="choose another name")
    rollout = Rollout(
        id=f"r-{secrets.token_hex(5)}",
        name=spec.name,
        alias=spec.alias or package.alias,
        package_name=package.name,
        package_version=package.version,
        manifest_sha256=package.manifest_sha256,
        scope=spec.scope,
        target_filter=spec.target_filter,
        status=RolloutStatus.WAITING_FOR_APPROVAL,
        soak_s=spec.soak_s,
        limits=spec.limits.model_dump(exclude_none=True),
        success_threshold=spec.success_threshold,
        error_threshold=spec.error_threshold,
        min_executed=spec.min_executed,
        queued_timeout_s=spec.queued_timeout_s,
        in_progress_timeout_s=spec.in_progress_timeout_s,
        max_unavailable=spec.max_unavailable,
        start_on_approval=spec.start_on_approval,
        created_by=actor.principal_id,
        published_by=package.published_by,
        created_at=now,
        pause_reason="",
    )
    rollout.digest = digest(immutable_facts(rollout), spec.groups)
    session.add(rollout)
    session.flush()
    for position, group in enumerate(spec.groups):
        session.add(
            RolloutGroup(
                rollout_id=rollout.id,
                position=position,
                name=group.name,
                filter=group.filter,
                percent=group.percent,
                status=GroupStatus.SCHEDULED,
            )
        )
    session.flush()
    record_event(session, now, actor.name, "rollout.create", rollout.name, detail=_detail(rollout))
    return rollout


def approve(
    session: Session,
    actor: Identified,
    rollout: Rollout,
    *,
    seen_digest: str,
    comment: str,
    director: SigningKey,
    now: datetime,
) -> None:
    """Record an approval and, where the rollout says so, start it.

    ``seen_digest`` is what the approver looked at: it must be this rollout's.

    Raises:
        DeniedError: ``access.four_eyes``.
        ConflictError: ``rollout.status``, ``rollout.digest_mismatch``, or what ``start`` raises.
    """
    _expect(rollout, "approve", RolloutStatus.WAITING_FOR_APPROVAL)
    if actor.principal_id in {rollout.created_by, rollout.published_by}:
        part = "created the rollout" if actor.principal_id == rollout.created_by else "published its model"
        raise DeniedError(
            "access.four_eyes",
            f"{actor.name} {part} and cannot approve {rollout.name}",
            hint="ask another principal with the role approver",
            rollout=rollout.id,
        )
    _decide(session, actor, rollout, Decision.APPROVE, seen_digest=seen_digest, comment=comment, now=now)
    rollout.status = RolloutStatus.READY
    record_event(session, now, actor.name, "rollout.approve", rollout.name, detail=_detail(rollout))
    if rollout.start_on_approval:
        start(session, actor, rollout, director, now)


def deny(
    session: Session, actor: Identified, rollout: Rollout, *, seen_digest: str, comment: str, now: datetime
) -> None:
    """Record a refusal; the rollout ends here.

    Raises:
        ConflictError: ``rollout.status`` or ``rollout.digest_mismatch``.
    """
    _expect(rollout, "deny", RolloutStatus.WAITING_FOR_APPROVAL)
    _decide(session, actor, rollout, Decision.DENY, seen_digest=seen_digest, comment=comment, now=now)
    rollout.status, rollout.finished_at = RolloutStatus.APPROVAL_DENIED, now
    record_event(session, now, actor.name, "rollout.deny", rollout.name, detail=_detail(rollout))


def start(session: Session, actor: Identified, rollout: Rollout, director: SigningKey, now: datetime) -> None:
    """Freeze which boards belong to which group, and begin with the first.

    Raises:
        RefusedError: ``rollout.altered`` when the stored rollout is not the one that was approved.
        ConflictError: ``rollout.status``, ``rollout.no_targets``, ``rollout.overlap``, ``rollout.too_many_aliases``.
    """
    _expect(rollout, "start", RolloutStatus.READY)
    if digest(immutable_facts(rollout), queries.group_specs(session, rollout)) != rollout.digest:
        raise RefusedError(
            "rollout.altered",
            f"{rollout.name} is not what was approved",
            hint="find out who changed the database, and create the rollout anew",
            rollout=rollout.id,
        )
    placement = queries.preview(session, rollout)
    devices = [device for group in placement.groups for device in group]
    if not devices:
        raise ConflictError(
            "rollout.no_targets",
            f"{rollout.name} takes no board",
            hint="compare its scope, filter, and groups with `garrison device list`",
        )
    rivals = queries.rivals(session, rollout, devices)
    if rivals:
        name, device = rivals[0]
        raise ConflictError(
            "rollout.overlap",
            f"rollout {name} is still at work on {rollout.alias} on {device}"
            + (f" and {len(rivals) - 1} more" if len(rivals) > 1 else ""),
            hint=f"wait for it, or `garrison rollout stop {name}`",
            rollout=name,
        )
    full = queries.boards_without_room(session, rollout.alias, devices, MAX_ALIASES)
    if full:
        raise ConflictError(
            "rollout.too_many_aliases",
            f"{full[0]} has {MAX_ALIASES} aliases already and takes no further one",
            hint="use an alias that the board has, or leave the board out by the filter",
            device=full[0],
        )
    for position, members in enumerate(placement.groups):
        for device in members:
            session.add(Target(rollout_id=rollout.id, device_id=device, position=position, state=TargetState.SCHEDULED))
    rollout.status, rollout.started_at = RolloutStatus.RUNNING, now
    session.flush()
    record_event(session, now, actor.name, "rollout.start", rollout.name, detail={"boards": len(devices)})
    execution.advance(session, rollout, director, now)


def pause(
    session: Session, actor: Identified, rollout: Rollout, director: SigningKey, now: datetime, *, reason: str = ""
) -> None:
    """Take the change back from boards that are not yet loading it; the others carry on.

    Raises:
        ConflictError: ``rollout.status``.
    """
    _expect(rollout, "pause", RolloutStatus.RUNNING)
    rollout.status, rollout.pause_reason = RolloutStatus.PAUSED, reason or f"paused by {actor.name}"
    withdrawn = execution.withdraw(session, rollout, director, now)
    record_event(session, now, actor.name, "rollout.pause", rollout.name, detail={"withdrawn": len(withdrawn)})


def resume(session: Session, actor: Identified, rollout: Rollout, director: SigningKey, now: datetime) -> None:
    """Go on where the rollout paused; the failures so far do not pause it again.

    Raises:
        ConflictError: ``rollout.status``, or ``rollout.group_failed`` when a group can no longer reach its threshold.
    """
    _expect(rollout, "resume", RolloutStatus.PAUSED)
    execution.accept_failures(session, rollout)
    rollout.status, rollout.pause_reason = RolloutStatus.RUNNING, ""
    record_event(session, now, actor.name, "rollout.resume", rollout.name)
    execution.advance(session, rollout, director, now)


def stop(session: Session, actor: Identified, rollout: Rollout, director: SigningKey, now: datetime) -> None:
    """End the rollout: every board that did not succeed gets back what it had before.

    Raises:
        ConflictError: ``rollout.status``.
    """
    _expect(
        rollout,
        "stop",
        RolloutStatus.WAITING_FOR_APPROVAL,
        RolloutStatus.READY,
        RolloutStatus.RUNNING,
        RolloutStatus.PAUSED,
    )
    rollout.status, rollout.finished_at = RolloutStatus.STOPPED, now
    restored = execution.restore_unsuccessful(session, rollout, director, now)
    record_event(session, now, actor.name, "rollout.stop", rollout.name, detail={"restored": len(restored)})


def trigger_next_group(
    session: Session, actor: Identified, rollout: Rollout, director: SigningKey, now: datetime
) -> str:
    """Begin the next group without waiting for the ones at work, and return its name: an operator's own decision.

    Raises:
        ConflictError: ``rollout.status`` or ``rollout.no_next_group``.
    """
    _expect(rollout, "trigger the next group of", RolloutStatus.RUNNING)
    name = execution.start_next_group(session, rollout, now)
    record_event(session, now, actor.name, "rollout.trigger-next-group", rollout.name, detail={"group": name})
    execution.advance(session, rollout, director, now)
    return name


def tick(database: Database, director: SigningKey, now: datetime) -> bool:
    """Advance every running rollout, each in a transaction of its own; return whether desired state changed.

    One that cannot be advanced is logged, and stops no other.
    """
    with database.reading() as session:
        running = queries.running_ids(session)
    changed = False
    for rollout_id in running:
        try:
            with database.session() as session:
                rollout = queries.find(session, rollout_id, lock=True)
                changed = execution.advance(session, rollout, director, now) or changed
        except Exception:  # noqa: BLE001 -- see above; it is due again at the next tick
            _LOG.exception("rollout %s could not be advanced", rollout_id)
    return changed


def immutable_facts(rollout: Rollout) -> dict[str, object]:
    """Return what a rollout's digest covers, its groups aside."""
    return {
        "id": rollout.id,
        "name": rollout.name,
        "alias": rollout.alias,
        "package": {
            "name": rollout.package_name,
            "version": rollout.package_version,
            "manifest_sha256": rollout.manifest_sha256,
        },
        "scope": rollout.scope,
        "target_filter": rollout.target_filter,
        "soak_s": float(rollout.soak_s),
        "limits": {key: float(str(value)) for key, value in rollout.limits.items()},
        "success_threshold": rollout.success_threshold,
        "error_threshold": rollout.error_threshold,
        "min_executed": rollout.min_executed,
        "queued_timeout_s": rollout.queued_timeout_s,
        "in_progress_timeout_s": rollout.in_progress_timeout_s,
        "max_unavailable": rollout.max_unavailable,
        "start_on_approval": rollout.start_on_approval,
        "created_by": rollout.created_by,
        "published_by": rollout.published_by,
    }


def _decide(
    session: Session,
    actor: Identified,
    rollout: Rollout,
    decision: Decision,
    *,
    seen_digest: str,
    comment: str,
    now: datetime,
) -> None:
    if seen_digest != rollout.digest:
        raise ConflictError(
            "rollout.digest_mismatch",
            f"the decision names digest {seen_digest[:64]}, and {rollout.name} has {rollout.digest}",
            hint=f"look at it again with `garrison rollout show {rollout.name}`",
        )
    session.add(
        Approval(
            rollout_id=rollout.id,
            principal_id=actor.principal_id,
            digest=seen_digest,
            decision=decision,
            comment=comment,
            at=now,
        )
    )
    session.flush()  # the database's triggers ask for the approval before the status changes


def _expect(rollout: Rollout, verb: str, *statuses: RolloutStatus) -> None:
    if rollout.status not in statuses:
        raise ConflictError(
            "rollout.status",
            f"cannot {verb} {rollout.name}: it is {rollout.status}",
            hint=f"this needs {' or '.join(statuses)}; see `garrison rollout show {rollout.name}`",
            rollout=rollout.id,
            status=rollout.status,
        )


def _detail(rollout: Rollout) -> dict[str, object]:
    return {
        "rollout": rollout.id,
        "digest": rollout.digest,
        "package": f"{rollout.package_name}:{rollout.package_version}",
    }
