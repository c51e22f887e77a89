"""Requests for enrolment without a token: a board asks, an operator compares fingerprints and decides.

Strangers can ask too, so the queue is bounded: when it is full, newcomers are refused and nobody is dropped. Each
function runs inside the caller's transaction. Source: docs/protocol.md, "Enrolment".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from garrison_controller.access.events import record_event
from garrison_controller.devices import enrolment, names
from garrison_controller.devices.enrolment import REPEAT_WINDOW, Admission, Admitted, Newcomer
from garrison_controller.devices.service import keep_certificate
from garrison_controller.devices.tables import (
    ADMITTED,
    APPROVED,
    DENIED,
    ENROLLED,
    PENDING,
    Device,
    EnrolmentRequest,
)
from garrison_protocol.errors import ConflictError, NotFoundError, RefusedError, UnavailableError
from garrison_protocol.messages.enrolment import EnrolRequest, OfflineRequest, key_fingerprint

MAX_PENDING = 1000
LIFETIME = timedelta(days=7)
_FINGERPRINT_DIGITS = 32
_MAX_ADDRESS_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Waiting:
    """The board has to ask again until somebody has decided."""

    fingerprint: str
    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """What an approver gives a board. ``name`` empty: what the board asked for."""

    group: str
    labels: dict[str, str]
    name: str = ""


def ask(session: Session, request: EnrolRequest, admission: Admission, *, address: str) -> Admitted | Waiting:
    """Answer a board that came without a token: it waits, or it is admitted as what an operator approved.

    Raises:
        RefusedError: ``enrolment.bad_proof``, ``enrolment.denied``, ``enrolment.identity_taken``,
            ``enrolment.identity_retired``, ``enrolment.token_used``, ``enrolment.csr_refused``, ``renewal.too_often``.
        InvalidError: ``device.name_malformed``.
        UnavailableError: ``enrolment.queue_full``.
    """
    enrolment.check_proof(request.identity, "", request.csr_pem, request.proof)
    now, newcomer = admission.now, Newcomer(request.identity, request.csr_pem)
    row = session.get(EnrolmentRequest, request.identity, with_for_update=True)
    if row is not None and now >= row.expires_at:
        session.delete(row)
        session.flush()
        row = None
    if row is None:
        return _wait(session, request, now, address)
    if row.state == APPROVED:
        enrolment.check_identity_is_new(session, request.identity, None)  # it may have come with a token meanwhile
        by: dict[str, object] = {"approved_by": row.decided_by}
        place = (row.group, row.labels)
        admitted = enrolment.admit(session, row.device_id, newcomer, admission, place=place, by=by)
        row.state, row.expires_at = ADMITTED, now + REPEAT_WINDOW
        return admitted
    if row.state == ADMITTED:
        since = row.expires_at - REPEAT_WINDOW
        return enrolment.repeat(session, row.device_id, newcomer, since, admission)
    if row.state == DENIED:
        raise RefusedError(
            "enrolment.denied",
            "an operator denied this board's enrolment",
            hint="ask the operator; `garrison device enroll approve` still admits it",
            fingerprint=row.fingerprint,
        )
    return Waiting(row.fingerprint, row.asked_name)


def listed(session: Session, now: datetime) -> list[EnrolmentRequest]:
    """Return every request that still counts, the oldest first; those that led to a board are left out."""
    return list(
        session.scalars(
            select(EnrolmentRequest)
            .where(EnrolmentRequest.state != ADMITTED, EnrolmentRequest.expires_at > now)
            .order_by(EnrolmentRequest.asked_at, EnrolmentRequest.fingerprint)
        )
    )


def find(session: Session, fingerprint: str, now: datetime) -> EnrolmentRequest:
    """Return the request with this fingerprint, locked. All of it is needed: a part of it could be imitated.

    Raises:
        NotFoundError: ``enrolment.request_not_found``.
    """
    digits = re.sub(r"[-\s:]", "", fingerprint).lower()[:_FINGERPRINT_DIGITS]
    written = "-".join(digits[at : at + 4] for at in range(0, len(digits), 4))
    row = session.scalar(select(EnrolmentRequest).where(EnrolmentRequest.fingerprint == written).with_for_update())
    if row is None or now >= row.expires_at or row.state == ADMITTED:
        raise NotFoundError(
            "enrolment.request_not_found",
            f"no board with fingerprint {fingerprint[:64]} waits",
            hint="type all eight groups that the board shows; see `garrison device enroll list`",
        )
    return row


def approve(session: Session, actor: str, fingerprint: str, place: Place, now: datetime) -> EnrolmentRequest:
    """Let the board with this fingerprint in, the next time it asks; return its request.

    Raises:
        NotFoundError: ``enrolment.request_not_found``.
        InvalidError: ``device.name_malformed``, ``access.scope_malformed``, ``device.labels_malformed``.
        ConflictError: ``device.name_taken``.
    """
    row = find(session, fingerprint, now)
    row.device_id = _name(session, place, row.asked_name, row.identity_public, now)
    row.state, row.group, row.labels = APPROVED, place.group, place.labels
    row.decided_at, row.decided_by, row.expires_at = now, actor, now + LIFETIME
    detail = {"fingerprint": row.fingerprint, "group": row.group}
    record_event(session, now, actor, "device.enrol.approve", row.device_id, detail=detail)
    return row


def deny(session: Session, actor: str, fingerprint: str, now: datetime) -> EnrolmentRequest:
    """Refuse the board with this fingerprint; approving it later is possible. Return its request.

    Raises:
        NotFoundError: ``enrolment.request_not_found``.
    """
    row = find(session, fingerprint, now)
    row.state, row.device_id, row.decided_at, row.decided_by = DENIED, "", now, actor
    row.expires_at = now + LIFETIME
    record_event(session, now, actor, "device.enrol.deny", row.fingerprint, detail={"asked_name": row.asked_name})
    return row


def admit_offline(
    session: Session, actor: str, request: OfflineRequest, place: Place, admission: Admission
) -> Admitted:
    """Admit a board whose request somebody carried here; a repeated request of an admitted board is answered again.

    The certificate ends at ``admission.days``, whenever the answer arrives; the board renews it when it can.

    Raises:
        RefusedError: ``enrolment.bad_proof``, ``enrolment.identity_taken``, ``enrolment.identity_retired``,
            ``enrolment.csr_refused``.
        InvalidError: ``device.name_malformed``, ``access.scope_malformed``, ``device.labels_malformed``.
        ConflictError: ``device.name_taken``, ``enrolment.name_needed``.
    """
    enrolment.check_proof(request.identity, "", request.csr_pem, request.proof)
    now, newcomer = admission.now, Newcomer(request.identity, request.csr_pem)
    known = session.scalar(select(Device).where(Device.identity_public == request.identity).with_for_update())
    if known is not None and known.state == ENROLLED and place.name in {"", known.id}:
        issued = admission.authority.issue_device(known.id, request.csr_pem, admission.days, now)
        keep_certificate(session, known, issued, now)
        detail = {"serial": issued.serial, "offline": True}
        record_event(session, now, actor, "device.enrol.repeat", known.id, detail=detail)
        return Admitted(known.id, issued.pem)
    enrolment.check_identity_is_new(session, request.identity, None)
    name = _name(session, place, request.name, request.identity, now)
    session.execute(delete(EnrolmentRequest).where(EnrolmentRequest.identity_public == request.identity))
    by: dict[str, object] = {"approved_by": actor, "offline": True}
    admitted = enrolment.admit(session, name, newcomer, admission, place=(place.group, place.labels), by=by)
    fingerprint = key_fingerprint(request.identity)
    record_event(
        session, now, actor, "device.enrol.approve", name, detail={"fingerprint": fingerprint, "offline": True}
    )
    return admitted


def _wait(session: Session, request: EnrolRequest, now: datetime, address: str) -> Waiting:
    enrolment.check_identity_is_new(session, request.identity, None)
    if request.name:
        names.check_name(request.name)
    session.execute(delete(EnrolmentRequest).where(EnrolmentRequest.expires_at <= now))
    waiting = session.scalar(
        select(func.count()).select_from(EnrolmentRequest).where(EnrolmentRequest.state == PENDING)
    )
    if (waiting or 0) >= MAX_PENDING:
        raise UnavailableError(
            "enrolment.queue_full",
            f"{MAX_PENDING} boards wait for a decision already",
            hint="an operator has to decide first: `garrison device enroll list`; or use an enrolment token",
            retryable=True,
        )
    row = EnrolmentRequest(
        identity_public=request.identity,
        fingerprint=key_fingerprint(request.identity),
        asked_name=request.name,
        address=address[:_MAX_ADDRESS_LENGTH],
        state=PENDING,
        device_id="",
        group="/",
        labels={},
        asked_at=now,
        expires_at=now + LIFETIME,
    )
    session.add(row)
    session.flush()
    detail = {"asked_name": request.name, "address": row.address}
    record_event(session, now, "enrolment", "device.enrol.ask", row.fingerprint, detail=detail)
    return Waiting(row.fingerprint, row.asked_name)


def _name(session: Session, place: Place, asked: str, identity: str, now: datetime) -> str:
    name = place.name or asked
    if not name:
        raise ConflictError(
            "enrolment.name_needed", "the board asked for no name", hint="name it: --name edge-7", retryable=False
        )
    names.check_name(name)
    names.check_place(place.group, place.labels)
    names.check_free(session, name, now, but=identity)
    names.check_not_given_out(session, name, now)
    return name
