"""Use cases of admitted boards: recognise, renew, revoke. Each runs inside the caller's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from garrison_controller.access.events import record_event
from garrison_controller.devices import queries, tokens
from garrison_controller.devices.ca import Authority, Issued
from garrison_controller.devices.sessions import Sessions
from garrison_controller.devices.tables import ENROLLED, REVOKED, ROTATE, Device, IssuedCertificate
from garrison_controller.rollouts import boards
from garrison_protocol import keys
from garrison_protocol.errors import RefusedError, UnauthenticatedError
from garrison_protocol.messages.enrolment import RenewRequest, SessionRequest, renewal_bytes, session_bytes

RENEWALS_A_DAY = 24
"""A revocation list names every certificate that has not ended: a board must not be able to make it long."""


class Nonces(Protocol):
    """Makes a request good for one time: ``Sessions`` for what comes over a network."""

    def spend_nonce(self, nonce: str) -> None:
        """Return if nobody has used ``nonce`` before; nobody can use it again. Raises GarrisonError."""
        ...


@dataclass(frozen=True, slots=True)
class Renewed:
    """A board's next certificate."""

    certificate_pem: str


def renew(
    session: Session,
    request: RenewRequest,
    sessions: Nonces,
    authority: Authority,
    *,
    days: int,
    grace_days: int,
    now: datetime,
) -> Renewed:
    """Return a certificate for the new TLS key of an admitted board, whose last one ended at most ``grace_days`` ago.

    Earlier certificates stay valid until they end: the board may have to go on with one. An error that names the
    device in its fields was caused by that board itself; the others anybody may cause.

    Raises:
        RefusedError: ``device.unknown``, ``renewal.bad_proof``, ``device.revoked``, ``renewal.grace_over``,
            ``renewal.too_often``, ``enrolment.csr_refused``.
        UnauthenticatedError: ``session.nonce_invalid``.
    """
    device = session.get(Device, request.device, with_for_update=True)
    if device is None:
        raise RefusedError("device.unknown", f"no board {request.device} is enrolled", hint="enrol it")
    proven = renewal_bytes(request.device, request.nonce, request.csr_pem)
    if not keys.verify(device.identity_public, bytes.fromhex(request.proof), proven):
        raise RefusedError(
            "renewal.bad_proof",
            f"the request is not by the identity key of {device.id}",
            hint=f"this board was replaced, or its identity folder is another's: `garrison device rotate {device.id}`",
        )
    sessions.spend_nonce(request.nonce)
    enrolled_device(session, device.id)
    if now - device.cert_not_after > timedelta(days=grace_days):
        raise RefusedError(
            "renewal.grace_over",
            f"the certificate of {device.id} ended {device.cert_not_after:%Y-%m-%d}, more than {grace_days} days ago",
            hint=f"`garrison device rotate {device.id}`, then enrol the board with that line",
            device=device.id,
        )
    check_rate(session, device.id, now)
    try:
        issued = authority.issue_device(device.id, request.csr_pem, days, now)
    except RefusedError as error:
        raise RefusedError(error.code, error.message, hint=error.hint, device=device.id) from error
    keep_certificate(session, device, issued, now)
    detail = {"serial": issued.serial, "not_after": issued.not_after.isoformat()}
    record_event(session, now, actor(device.id), "device.renew", device.id, detail=detail)
    return Renewed(issued.pem)


def open_session(session: Session, request: SessionRequest, sessions: Sessions) -> str:
    """Return a bearer for the board that answered a nonce with its identity key.

    Raises:
        RefusedError: ``session.bad_proof``, ``device.unknown``, ``device.revoked``.
        UnauthenticatedError: ``session.nonce_invalid``.
    """
    device = enrolled_device(session, request.device)
    proven = session_bytes(request.device, request.nonce)
    if not keys.verify(device.identity_public, bytes.fromhex(request.proof), proven):
        raise RefusedError(
            "session.bad_proof",
            f"the answer is not by the identity key of {device.id}",
            hint="the board's identity folder belongs to another enrolment; enrol it under a new name",
        )
    sessions.spend_nonce(request.nonce)
    return sessions.open(device.id, device.identity_public)


def session_device(session: Session, sessions: Sessions, bearer: str) -> str:
    """Return the id of the board that calls with ``bearer``; one revoked or replaced since is refused at once.

    Raises:
        UnauthenticatedError: ``session.expired``.
        RefusedError: ``device.revoked``, ``device.unknown``.
    """
    device_id, identity = sessions.holder(bearer)
    device = enrolled_device(session, device_id)
    if not device.identity_public.startswith(identity):
        raise UnauthenticatedError(
            "session.expired",
            f"{device_id} has another identity since",
            hint="answer a new nonce at /device/v1/session with it",
        )
    return device.id


def enrolled_device(session: Session, device_id: str) -> Device:
    """Return a board that is admitted now.

    Raises:
        RefusedError: ``device.unknown`` or ``device.revoked``.
    """
    device = session.get(Device, device_id)
    if device is None:
        raise RefusedError("device.unknown", f"no board {device_id} is enrolled", hint="enrol it", device=device_id)
    if device.state != ENROLLED:
        raise RefusedError(
            "device.revoked",
            f"{device_id} is revoked",
            hint=f"`garrison device rotate {device_id}` gives the name a new identity; or enrol under a new name",
            device=device_id,
        )
    return device


def revoke(session: Session, actor: str, device_id: str, reason: str, now: datetime) -> Device:
    """Shut a board out: its messages and requests are refused from the commit on; return it.

    It leaves its rollouts, where it counts as not successful, and holds nobody's place. Strings that would give its
    name away end too. The caller writes the revocation list after the commit. Revoking again changes nothing.

    Raises:
        NotFoundError: ``device.not_found``.
    """
    device = queries.get(session, device_id)
    if device.state == REVOKED:
        return device
    device.state, device.online = REVOKED, False
    revoke_certificates(session, device_id, now)
    tokens.end_unused(session, device_id, ROTATE, now)
    boards.leave(session, device_id, now)
    record_event(session, now, actor, "device.revoke", device_id, detail={"reason": reason})
    return device


def keep_certificate(session: Session, device: Device, issued: Issued, now: datetime) -> None:
    """Record a certificate that was signed for an admitted board as its newest."""
    device.cert_serial, device.cert_not_after = issued.serial, issued.not_after
    session.add(
        IssuedCertificate(
            serial=issued.serial,
            issuer=issued.issuer,
            device_id=device.id,
            not_after=issued.not_after,
            issued_at=now,
        )
    )


def revoke_certificates(session: Session, device_id: str, now: datetime) -> None:
    """End every certificate of a board; the caller writes the revocation list after the commit."""
    for certificate in session.scalars(
        select(IssuedCertificate).where(
            IssuedCertificate.device_id == device_id, IssuedCertificate.revoked_at.is_(None)
        )
    ):
        certificate.revoked_at = now


def actor(device_id: str) -> str:
    """Return who acts in the record of events when a board does."""
    return f"device:{device_id}"


def check_rate(session: Session, device_id: str, now: datetime) -> None:
    """Return if a board may have one more certificate today.

    Raises:
        RefusedError: ``renewal.too_often``.
    """
    recent = session.scalar(
        select(func.count())
        .select_from(IssuedCertificate)
        .where(IssuedCertificate.device_id == device_id, IssuedCertificate.issued_at > now - timedelta(days=1))
    )
    if (recent or 0) >= RENEWALS_A_DAY:
        raise RefusedError(
            "renewal.too_often",
            f"{device_id} got {recent} certificates within a day",
            hint="see on the board why it asks again and again: `garrison-agent doctor`",
            device=device_id,
        )
