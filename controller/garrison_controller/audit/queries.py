"""Every select about streams and alarms. ``scopes`` are the group paths that the caller may read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from sqlalchemy import or_, select
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from garrison_controller.audit.tables import Alarm, Refusal, StreamRow, StreamState
from garrison_controller.devices.tables import Device
from garrison_protocol.states import Stream

ROWS_AT_ONCE = 500


def in_scopes(scopes: Sequence[str]) -> ColumnElement[bool]:
    """Return the condition that a board lies in one of ``scopes``."""
    return or_(*(Device.group.startswith(scope, autoescape=True) for scope in scopes))


def boards(session: Session, scopes: Sequence[str], device: str | None = None) -> Sequence[str]:
    """Return the ids of boards in ``scopes``, with or without a stream."""
    statement = select(Device.id).where(in_scopes(scopes)).order_by(Device.id)
    if device is not None:
        statement = statement.where(Device.id == device)
    return session.scalars(statement).all()


def streams(session: Session, scopes: Sequence[str], device: str | None = None) -> Sequence[StreamState]:
    """Return where every stream stands, by board, stream, and age."""
    statement = (
        select(StreamState)
        .join(Device, Device.id == StreamState.device_id)
        .where(in_scopes(scopes))
        .order_by(StreamState.device_id, StreamState.stream, StreamState.opened_at)
    )
    if device is not None:
        statement = statement.where(StreamState.device_id == device)
    return session.scalars(statement).all()


def entries(
    session: Session,
    scopes: Sequence[str],
    *,
    device: str | None = None,
    kind: str | None = None,
    since_ms: int | None = None,
    limit: int = 100,
) -> list[StreamRow]:
    """Return the newest audit entries by the boards' clocks, the oldest of them first.

    ``kind`` may end with ``*`` to match every kind that begins so.
    """
    statement = (
        select(StreamRow)
        .join(Device, Device.id == StreamRow.device_id)
        .where(StreamRow.stream == Stream.AUDIT, in_scopes(scopes))
        .order_by(StreamRow.time_ms.desc(), StreamRow.device_id, StreamRow.seq.desc())
        .limit(limit)
    )
    if device is not None:
        statement = statement.where(StreamRow.device_id == device)
    if kind is not None and kind.endswith("*"):
        statement = statement.where(StreamRow.kind.startswith(kind[:-1], autoescape=True))
    elif kind is not None:
        statement = statement.where(StreamRow.kind == kind)
    if since_ms is not None:
        statement = statement.where(StreamRow.time_ms >= since_ms)
    return list(reversed(session.scalars(statement).all()))


def export(session: Session, scopes: Sequence[str], device: str | None = None) -> Iterator[StreamRow]:
    """Yield every audit entry by board, epoch, and sequence, in constant memory."""
    statement = (
        select(StreamRow)
        .join(Device, Device.id == StreamRow.device_id)
        .where(StreamRow.stream == Stream.AUDIT, in_scopes(scopes))
        .order_by(StreamRow.device_id, StreamRow.epoch, StreamRow.seq)
        .execution_options(yield_per=ROWS_AT_ONCE)
    )
    if device is not None:
        statement = statement.where(StreamRow.device_id == device)
    with closing(session.scalars(statement)) as rows:
        for row in rows:
            yield row
            session.expunge(row)


def alarms(session: Session, scopes: Sequence[str], device: str | None = None, limit: int = 100) -> Sequence[Alarm]:
    """Return alarms, those that happened last first."""
    statement = (
        select(Alarm)
        .join(Device, Device.id == Alarm.device_id)
        .where(in_scopes(scopes))
        .order_by(Alarm.last_at.desc(), Alarm.id.desc())
        .limit(limit)
    )
    if device is not None:
        statement = statement.where(Alarm.device_id == device)
    return session.scalars(statement).all()


def refusals(session: Session) -> Sequence[Refusal]:
    """Return how many messages were refused, by sender and code."""
    return session.scalars(select(Refusal).order_by(Refusal.sender, Refusal.code)).all()
