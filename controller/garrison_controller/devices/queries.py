"""Every select about boards."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from garrison_controller.devices.filter import DeviceFacts, Term, holds
from garrison_controller.devices.tables import ENROLLED, Device, EnrolmentToken, IssuedCertificate
from garrison_protocol.errors import NotFoundError


def facts(device: Device) -> DeviceFacts:
    """Return what filters may ask about a board."""
    return DeviceFacts(device.id, device.group, device.labels)


def get(session: Session, device_id: str) -> Device:
    """Return a board, revoked ones included.

    Raises:
        NotFoundError: ``device.not_found``.
    """
    device = session.get(Device, device_id)
    if device is None:
        raise NotFoundError("device.not_found", f"no board {device_id[:64]}", hint="see `garrison device list`")
    return device


def enrolled(session: Session) -> list[Device]:
    """Return every board that is admitted, by id."""
    return list(session.scalars(select(Device).where(Device.state == ENROLLED).order_by(Device.id)))


def page(
    session: Session, terms: tuple[Term, ...], scopes: Sequence[str], *, after: str, limit: int
) -> tuple[list[Device], bool]:
    """Return up to ``limit`` boards with ids above ``after`` that meet the filter and lie in one of ``scopes``.

    The second value tells whether there are more.
    """
    in_scope = or_(*(Device.group.startswith(scope, autoescape=True) for scope in scopes))
    rows = session.scalars(select(Device).where(Device.id > after, in_scope).order_by(Device.id)).yield_per(500)
    found: list[Device] = []
    for device in rows:
        if holds(facts(device), terms):
            found.append(device)
            if len(found) > limit:
                break
    return found[:limit], len(found) > limit


def token_by_hash(session: Session, token_sha256: str) -> EnrolmentToken | None:
    """Return an enrolment token, locked until the transaction ends."""
    return session.scalar(select(EnrolmentToken).where(EnrolmentToken.token_sha256 == token_sha256).with_for_update())


def pending_groups(session: Session, device_id: str, now: datetime) -> Sequence[str]:
    """Return the groups into which tokens that may still be used would admit ``device_id``."""
    return session.scalars(
        select(EnrolmentToken.group).where(
            EnrolmentToken.device_id == device_id, EnrolmentToken.used_at.is_(None), EnrolmentToken.expires_at > now
        )
    ).all()


def revoked_certificates(session: Session, now: datetime) -> list[tuple[str, datetime]]:
    """Return serial number and time of every revoked certificate that has not ended anyway."""
    rows = session.scalars(
        select(IssuedCertificate)
        .where(IssuedCertificate.revoked_at.is_not(None), IssuedCertificate.not_after > now)
        .order_by(IssuedCertificate.serial)
    )
    return [(row.serial, row.revoked_at) for row in rows if row.revoked_at is not None]


def certificates_ending(session: Session, before: datetime) -> list[Device]:
    """Return admitted boards whose newest certificate ends before a time."""
    return list(
        session.scalars(
            select(Device).where(Device.state == ENROLLED, Device.cert_not_after < before).order_by(Device.id)
        )
    )
