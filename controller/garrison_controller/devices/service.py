"""Use cases of boards: admit, recognise, revoke. Each runs inside the caller's transaction."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.events import record_event
from garrison_controller.access.rules import check_scope
from garrison_controller.devices import queries
from garrison_controller.devices.ca import Authority, Issued
from garrison_controller.devices.sessions import Sessions
from garrison_controller.devices.tables import ENROLLED, REVOKED, Device, EnrolmentToken, IssuedCertificate
from garrison_protocol import keys
from garrison_protocol.errors import ConflictError, InvalidError, RefusedError
from garrison_protocol.ids import is_device_id
from garrison_protocol.messages.enrolment import EnrolRequest, SessionRequest, proof_bytes, session_bytes

REPEAT_WINDOW = timedelta(hours=1)
"""How long after its success an enrolment may be repeated by the same key: its answer may have been lost."""
MAX_LABELS = 32
MAX_LABEL_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Admitted:
    """A board that may now connect."""

    device: str
    certificate_pem: str


def create_token(
    session: Session, actor: str, device_id: str, *, group: str, labels: dict[str, str], hours: int, now: datetime
) -> tuple[EnrolmentToken, str]:
    """Add permission for one board to enrol under ``device_id``, and return it with its secret, known only now.

    Earlier unused tokens for the same id end.

    Raises:
        InvalidError: ``device.name_malformed``, ``access.scope_malformed``, ``device.labels_malformed``.
        ConflictError: ``device.name_taken``; an id belongs to one identity key for ever, or histories would mix.
    """
    if not is_device_id(device_id):
        raise InvalidError(
            "device.name_malformed",
            f"{device_id[:80]!r} cannot name a board",
            hint="use lower-case letters, digits and '-', at most 63; not beginning with 'controller'",
        )
    check_scope(group)
    _check_labels(labels)
    if session.get(Device, device_id) is not None:
        raise ConflictError(
            "device.name_taken",
            f"a board {device_id} is known already",
            hint="choose another name; a name stays with its first board, even after revocation",
        )
    for earlier in session.scalars(
        select(EnrolmentToken).where(EnrolmentToken.device_id == device_id, EnrolmentToken.used_at.is_(None))
    ):
        session.delete(earlier)
    secret = secrets.token_urlsafe(32)
    token = EnrolmentToken(
        token_sha256=_hash(secret),
        device_id=device_id,
        group=group,
        labels=labels,
        created_at=now,
        expires_at=now + timedelta(hours=hours),
        created_by=actor,
    )
    session.add(token)
    session.flush()
    record_event(session, now, actor, "device.token.create", device_id, detail={"group": group, "hours": hours})
    return token, secret


def enrol(session: Session, request: EnrolRequest, authority: Authority, *, days: int, now: datetime) -> Admitted:
    """Admit the board that holds the token, once; return its id and a certificate for its key.

    The same identity key may repeat the call within ``REPEAT_WINDOW`` and gets a fresh certificate.

    Raises:
        RefusedError: ``enrolment.bad_proof``, ``enrolment.token_unknown``, ``enrolment.token_used``,
            ``enrolment.token_expired``, ``enrolment.identity_taken``, ``enrolment.csr_refused``.
    """
    proven = proof_bytes(request.token, request.csr_pem)
    if not keys.verify(request.identity, bytes.fromhex(request.proof), proven):
        raise RefusedError(
            "enrolment.bad_proof", "the identity key did not sign this request", hint="run `garrison-agent enroll` anew"
        )
    token = queries.token_by_hash(session, _hash(request.token))
    if token is None:
        raise _token_refused("enrolment.token_unknown", "this enrolment token is not known", None)
    if token.used_at is not None:
        return _repeat(session, token, request, authority, days=days, now=now)
    if now >= token.expires_at:
        raise _token_refused(
            "enrolment.token_expired", f"the enrolment token for {token.device_id} has ended", token.device_id
        )
    _check_identity_is_new(session, token.device_id, request.identity)
    issued = authority.issue_device(token.device_id, request.csr_pem, days, now)
    device = Device(
        id=token.device_id,
        name=token.device_id,
        group=token.group,
        labels=token.labels,
        identity_public=request.identity,
        state=ENROLLED,
        enrolled_at=now,
        cert_serial=issued.serial,
        cert_not_after=issued.not_after,
        inventory={},
        status={},
    )
    session.add(device)
    session.flush()
    token.used_at = now
    _store_certificate(session, device, issued, now)
    record_event(
        session,
        now,
        _actor(device.id),
        "device.enrol",
        device.id,
        detail={"serial": issued.serial, "group": device.group},
    )
    return Admitted(device.id, issued.pem)


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
    return sessions.open(device.id)


def session_device(session: Session, sessions: Sessions, bearer: str) -> str:
    """Return the id of the board that calls with ``bearer``; one revoked since is refused at once.

    Raises:
        UnauthenticatedError: ``session.expired``.
        RefusedError: ``device.revoked``, ``device.unknown``.
    """
    return enrolled_device(session, sessions.device(bearer)).id


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
            "device.revoked", f"{device_id} is revoked", hint="enrol the board under a new name", device=device_id
        )
    return device


def revoke(session: Session, actor: str, device_id: str, reason: str, now: datetime) -> Device:
    """Shut a board out: its messages and requests are refused from the commit on; return it.

    The caller writes the revocation list after the commit. Revoking again changes nothing.

    Raises:
        NotFoundError: ``device.not_found``.
    """
    device = queries.get(session, device_id)
    if device.state == REVOKED:
        return device
    device.state, device.online = REVOKED, False
    for certificate in session.scalars(select(IssuedCertificate).where(IssuedCertificate.device_id == device_id)):
        certificate.revoked_at = now
    record_event(session, now, actor, "device.revoke", device_id, detail={"reason": reason})
    return device


def _repeat(
    session: Session, token: EnrolmentToken, request: EnrolRequest, authority: Authority, *, days: int, now: datetime
) -> Admitted:
    assert token.used_at is not None
    device = session.get(Device, token.device_id)
    if (
        device is None
        or device.identity_public != request.identity
        or device.state != ENROLLED
        or now - token.used_at > REPEAT_WINDOW
    ):
        raise _token_refused(
            "enrolment.token_used", f"the enrolment token for {token.device_id} was used already", token.device_id
        )
    issued = authority.issue_device(device.id, request.csr_pem, days, now)
    device.cert_serial, device.cert_not_after = issued.serial, issued.not_after
    _store_certificate(session, device, issued, now)
    record_event(session, now, _actor(device.id), "device.enrol.repeat", device.id, detail={"serial": issued.serial})
    return Admitted(device.id, issued.pem)


def _check_identity_is_new(session: Session, device_id: str, identity: str) -> None:
    other = session.scalar(select(Device).where((Device.identity_public == identity) | (Device.id == device_id)))
    if other is not None:
        raise RefusedError(
            "enrolment.identity_taken",
            f"this identity key, or the name {device_id}, belongs to board {other.id}",
            hint="one board has one name; to rename it, clear its identity folder and enrol it anew",
            device=device_id,
        )


def _store_certificate(session: Session, device: Device, issued: Issued, now: datetime) -> None:
    session.add(IssuedCertificate(serial=issued.serial, device_id=device.id, not_after=issued.not_after, issued_at=now))


def _token_refused(code: str, message: str, device: str | None) -> RefusedError:
    return RefusedError(
        code, message, hint="make a new one with `garrison device token create` and enrol with that", device=device
    )


def _check_labels(labels: dict[str, str]) -> None:
    if len(labels) > MAX_LABELS or any(
        not key or len(key) > MAX_LABEL_LENGTH or len(value) > MAX_LABEL_LENGTH or set(key + value) & set(",=*!\n")
        for key, value in labels.items()
    ):
        raise InvalidError(
            "device.labels_malformed",
            "a label is empty, too long, or holds one of , = * !",
            hint=f"use at most {MAX_LABELS} labels like site=berlin, each part at most {MAX_LABEL_LENGTH} characters",
        )


def _actor(device_id: str) -> str:
    return f"device:{device_id}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
