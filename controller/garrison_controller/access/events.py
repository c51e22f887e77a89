"""The record of administrative actions. Callers write it in the transaction that makes the change."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.access.tables import AdminEvent

DONE = "done"
DENIED = "denied"
REFUSED = "refused"
MAX_SUBJECT_LENGTH = 512


def record_event(
    session: Session,
    now: datetime,
    principal: str,
    action: str,
    subject: str,
    *,
    outcome: str = DONE,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Add one event to the caller's transaction. ``principal`` is a name; ``detail`` holds JSON values, no secrets."""
    session.add(
        AdminEvent(
            at=now,
            principal=principal,
            action=action,
            subject=subject[:MAX_SUBJECT_LENGTH],
            outcome=outcome,
            detail=dict(detail or {}),
        )
    )
