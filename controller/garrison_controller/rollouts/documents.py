"""Rollouts as JSON, for the API and the CLI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.tables import Principal
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts import queries
from garrison_controller.rollouts.specification import Placement
from garrison_controller.rollouts.states import RolloutStatus
from garrison_controller.rollouts.tables import Rollout, Target

_NOT_STARTED = frozenset({RolloutStatus.WAITING_FOR_APPROVAL, RolloutStatus.READY})


def summary(rollout: Rollout, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return a rollout in short. ``counts``: its boards by state."""
    return {
        "id": rollout.id,
        "name": rollout.name,
        "status": rollout.status,
        "alias": rollout.alias,
        "model": rollout.package_name,
        "version": rollout.package_version,
        "scope": rollout.scope,
        "boards": dict(sorted(counts.items())),
        "pause_reason": rollout.pause_reason,
        "created_at": _text(rollout.created_at),
        "started_at": _text(rollout.started_at),
        "finished_at": _text(rollout.finished_at),
    }


def detail(session: Session, rollout: Rollout) -> dict[str, Any]:
    """Return a rollout with its groups and boards; before it starts, with those it would take now."""
    names = _principal_names(session)
    targets = queries.targets_of(session, rollout.id)
    preview = queries.preview(session, rollout) if rollout.status in _NOT_STARTED else None
    return summary(rollout, Counter(target.state for target in targets)) | {
        "manifest_sha256": rollout.manifest_sha256,
        "target_filter": rollout.target_filter,
        "soak_s": rollout.soak_s,
        "limits": rollout.limits,
        "success_threshold": rollout.success_threshold,
        "error_threshold": rollout.error_threshold,
        "min_executed": rollout.min_executed,
        "queued_timeout_s": rollout.queued_timeout_s,
        "in_progress_timeout_s": rollout.in_progress_timeout_s,
        "max_unavailable": rollout.max_unavailable,
        "start_on_approval": rollout.start_on_approval,
        "created_by": names.get(rollout.created_by, rollout.created_by),
        "published_by": names.get(rollout.published_by, rollout.published_by),
        "digest": rollout.digest,
        "approvals": [
            {
                "principal": names.get(approval.principal_id, approval.principal_id),
                "decision": approval.decision,
                "digest": approval.digest,
                "comment": approval.comment,
                "at": _text(approval.at),
            }
            for approval in queries.approvals_of(session, rollout.id)
        ],
        "groups": _groups(session, rollout, targets, preview),
        "outside": None if preview is None else list(preview.outside),
    }


def _groups(
    session: Session, rollout: Rollout, targets: Sequence[Target], preview: Placement | None
) -> list[dict[str, Any]]:
    online = dict(
        session.execute(
            select(Device.id, Device.online)
            .join(Target, Target.device_id == Device.id)
            .where(Target.rollout_id == rollout.id)
        ).all()
    )
    return [
        {
            "name": group.name,
            "filter": group.filter,
            "percent": group.percent,
            "status": group.status,
            "started_at": _text(group.started_at),
            "finished_at": _text(group.finished_at),
            "would_take": None if preview is None else list(preview.groups[group.position]),
            "boards": [
                _target(target, online=online.get(target.device_id, False))
                for target in targets
                if target.position == group.position
            ],
        }
        for group in queries.groups_of(session, rollout.id)
    ]


def _target(target: Target, *, online: bool) -> dict[str, Any]:
    return {
        "device": target.device_id,
        "online": online,
        "state": target.state,
        "deployment": target.deployment,
        "step": target.step,
        "variant": target.variant,
        "progress_bytes": target.progress_bytes,
        "total_bytes": target.total_bytes,
        "error_code": target.error_code,
        "message": target.message,
        "evaluation": target.evaluation,
        "assigned_at": _text(target.assigned_at),
        "started_at": _text(target.started_at),
        "heard_at": _text(target.heard_at),
        "finished_at": _text(target.finished_at),
    }


def _principal_names(session: Session) -> dict[str, str]:
    return dict(session.execute(select(Principal.id, Principal.name)).all())


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
