"""The record of what boards were refused. Runs inside the caller's transaction.

What a board itself caused (it holds a token, or proved its identity key) is an event, at most one a minute for each
board and code. What anybody could have caused is only counted, so that strangers cannot fill the record.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.events import REFUSED, record_event
from garrison_controller.access.tables import AdminEvent
from garrison_controller.bus import refusals
from garrison_controller.devices.service import actor
from garrison_protocol.errors import GarrisonError

EVENT_EVERY = timedelta(minutes=1)


def record(session: Session, action: str, error: GarrisonError, now: datetime) -> None:
    """Record that a board was refused ``action`` with ``error``."""
    device, token = error.fields.get("device"), error.fields.get("token")
    known = device if isinstance(device, str) else ""
    refusals.count(session, known, error.code, error.message, now)
    if not known and token is None:
        return
    who = actor(known) if known else f"token:{token}"
    earlier = session.scalars(
        select(AdminEvent)
        .where(AdminEvent.principal == who, AdminEvent.action == action, AdminEvent.at > now - EVENT_EVERY)
        .order_by(AdminEvent.id)
    )
    if any(event.detail.get("code") == error.code for event in earlier):
        return
    detail: dict[str, object] = {"code": error.code} | ({} if token is None else {"token": token})
    record_event(session, now, who, action, known or who, outcome=REFUSED, detail=detail)
