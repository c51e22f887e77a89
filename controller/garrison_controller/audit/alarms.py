"""Raising alarms. Runs inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.audit.tables import Alarm

MAX_SUBJECT_LENGTH = 256


def raise_alarm(
    session: Session,
    device: str,
    code: str,
    *,
    subject: str,
    message: str,
    now: datetime,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Record an alarm about ``subject``; the same one again is counted."""
    subject = subject[:MAX_SUBJECT_LENGTH]
    found = session.scalars(
        select(Alarm).where(Alarm.device_id == device, Alarm.code == code, Alarm.subject == subject)
    ).first()
    if found is None:
        found = Alarm(device_id=device, code=code, subject=subject, first_at=now, count=0)
        session.add(found)
    found.count += 1
    found.last_at, found.message, found.detail = now, message, dict(detail or {})
    session.flush()
