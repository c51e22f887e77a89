"""Every select about boards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from garrison_controller.devices.filter import DeviceFacts, Term, holds
from garrison_controller.devices.tables import (
    ENROLLED,
    SINGLE,
    Device,
    EnrolmentToken,
    IssuedCertificate,
    RetiredIdentity,
    TokenUse,
)
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


def by_identity(session: Session, identity: str) -> Device | None:
    """Return the board whose present identity key this is."""
    return session.scalar(select(Device).where(Device.identity_public == identity))


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
    """Return the groups into which tokens for ``device_id`` alone that may still be used would admit it."""
    return session.scalars(
        select(EnrolmentToken.group).where(
            EnrolmentToken.name == device_id,
            EnrolmentToken.kind == SINGLE,
            EnrolmentToken.uses == 0,
            EnrolmentToken.revoked_at.is_(None),
            EnrolmentToken.expires_at > now,
        )
    ).all()


def open_tokens(session: Session, now: datetime) -> Sequence[EnrolmentToken]:
    """Return every enrolment token that may still be used."""
    return session.scalars(
        select(EnrolmentToken).where(
            EnrolmentToken.uses < EnrolmentToken.uses_max,
            EnrolmentToken.revoked_at.is_(None),
            EnrolmentToken.expires_at > now,
        )
    ).all()


def tokens(session: Session, scopes: Sequence[str]) -> Sequence[EnrolmentToken]:
    """Return every enrolment token that admits into one of ``scopes``, the newest first."""
    in_scope = or_(*(EnrolmentToken.group.startswith(scope, autoescape=True) for scope in scopes))
    return session.scalars(select(EnrolmentToken).where(in_scope).order_by(EnrolmentToken.id.desc())).all()


def admitted_by(session: Session, token_ids: Sequence[int]) -> dict[int, list[str]]:
    """Return which boards each of these tokens admitted, in order."""
    found: dict[int, list[str]] = {}
    rows = session.execute(
        select(TokenUse.token_id, TokenUse.device_id)
        .where(TokenUse.token_id.in_(token_ids))
        .order_by(TokenUse.used_at, TokenUse.device_id)
    )
    for token_id, device_id in rows:
        found.setdefault(token_id, []).append(device_id)
    return found


def retired_identities(session: Session, device_id: str) -> Sequence[RetiredIdentity]:
    """Return the keys that spoke for a board earlier, the oldest first."""
    return session.scalars(
        select(RetiredIdentity).where(RetiredIdentity.device_id == device_id).order_by(RetiredIdentity.until)
    ).all()


def revoked_certificates(session: Session, now: datetime) -> list[tuple[str, datetime]]:
    """Return serial number and time of every revoked certificate that has not ended anyway."""
    rows = session.scalars(
        select(IssuedCertificate)
        .where(IssuedCertificate.revoked_at.is_not(None), IssuedCertificate.not_after > now)
        .order_by(IssuedCertificate.serial)
    )
    return [(row.serial, row.revoked_at) for row in rows if row.revoked_at is not None]


def boards_certified_by(session: Session, issuer: str, now: datetime) -> dict[str, datetime]:
    """Return admitted boards with a certificate by ``issuer`` that still opens the broker, and until when it does."""
    rows = session.execute(
        select(Device.id, func.max(IssuedCertificate.not_after))
        .join(IssuedCertificate, IssuedCertificate.device_id == Device.id)
        .where(
            Device.state == ENROLLED,
            IssuedCertificate.issuer == issuer,
            IssuedCertificate.revoked_at.is_(None),
            IssuedCertificate.not_after > now,
        )
        .group_by(Device.id)
        .order_by(Device.id)
    )
    return {row[0]: row[1] for row in rows}


def boards_before_targets(session: Session, version: int) -> list[str]:
    """Return admitted boards that have not said that they hold ``version`` of targets, or a newer one."""
    return [board.id for board in enrolled(session) if _targets(board.status) < version]


def certificates_ending(session: Session, before: datetime) -> list[Device]:
    """Return admitted boards whose newest certificate ends before a time."""
    return list(
        session.scalars(
            select(Device).where(Device.state == ENROLLED, Device.cert_not_after < before).order_by(Device.id)
        )
    )


def _targets(status: Mapping[str, object]) -> int:
    """Return the version of targets in a board's status; 0 if it has not said."""
    registry = status.get("registry")
    version = registry.get("targets") if isinstance(registry, dict) else None
    return version if isinstance(version, int) else 0
