"""Admission: a board becomes known, or takes over the name of another. Runs inside the caller's transaction.

A retried enrolment whose answer was lost is recognised by its identity key, and answered with a fresh certificate.
Source: docs/protocol.md, "Enrolment".
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from garrison_controller.access.events import record_event
from garrison_controller.audit.tables import ReportState
from garrison_controller.devices import names, queries
from garrison_controller.devices.ca import Authority, Issued
from garrison_controller.devices.service import actor, check_rate, keep_certificate, revoke_certificates
from garrison_controller.devices.tables import (
    BATCH,
    ENROLLED,
    ROTATE,
    Device,
    EnrolmentToken,
    RetiredIdentity,
    TokenUse,
)
from garrison_controller.devices.tokens import hash_secret
from garrison_controller.rollouts import boards
from garrison_protocol import keys
from garrison_protocol.errors import RefusedError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.enrolment import EnrolRequest, key_fingerprint, proof_bytes

REPEAT_WINDOW = timedelta(hours=1)
"""How long after its success an enrolment may be repeated by the same key: its answer may have been lost."""


@dataclass(frozen=True, slots=True)
class Admission:
    """With what boards are admitted ``now``: the device CA, days of validity, the key that signs desired states."""

    authority: Authority
    director: SigningKey
    days: int
    now: datetime


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A board's public identity key (hex), which it proved to hold, and its certificate request."""

    identity: str
    csr_pem: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """A board that may now connect. ``replaced``: it took the name over, and the revocation list must be written."""

    device: str
    certificate_pem: str
    replaced: bool = False


def enrol(session: Session, request: EnrolRequest, admission: Admission) -> Admitted:
    """Admit the board that holds a token; return its id and a certificate for its key.

    The same identity key may repeat the call within ``REPEAT_WINDOW`` and gets a fresh certificate. An error that
    names the token (its number) in its fields was caused by someone who holds it; the others anybody may cause.

    Raises:
        RefusedError: ``enrolment.bad_proof``, ``enrolment.token_unknown``, ``enrolment.token_revoked``,
            ``enrolment.token_used``, ``enrolment.token_expired``, ``enrolment.identity_taken``,
            ``enrolment.identity_retired``, ``enrolment.csr_refused``, ``renewal.too_often``.
    """
    check_proof(request.identity, request.token, request.csr_pem, request.proof)
    token = queries.token_by_hash(session, hash_secret(request.token))
    if token is None:
        raise _token_refused("enrolment.token_unknown", "this enrolment token is not known", None)
    try:
        return _enrol_with(session, token, request, admission)
    except RefusedError as error:
        error.fields["token"] = token.id
        raise


def _enrol_with(session: Session, token: EnrolmentToken, request: EnrolRequest, admission: Admission) -> Admitted:
    newcomer = Newcomer(request.identity, request.csr_pem)
    use = session.scalar(
        select(TokenUse).where(TokenUse.token_id == token.id, TokenUse.identity_public == request.identity)
    )
    if use is not None:
        again = repeat(session, use.device_id, newcomer, use.used_at, admission)
        return Admitted(again.device, again.certificate_pem, replaced=token.kind == ROTATE)
    _check_token(token, admission.now)
    board = None if token.kind == BATCH else token.name
    check_identity_is_new(session, request.identity, board)
    try:
        admitted = _admit_by_token(session, token, newcomer, request.name, admission)
    except IntegrityError as error:  # another transaction was quicker, on a database that lets both run
        raise _taken(token.name, board) from error
    token.uses += 1
    session.add(
        TokenUse(token_id=token.id, device_id=admitted.device, identity_public=newcomer.identity, used_at=admission.now)
    )
    session.flush()
    return admitted


def _admit_by_token(
    session: Session, token: EnrolmentToken, newcomer: Newcomer, asked: str, admission: Admission
) -> Admitted:
    if token.kind == ROTATE:
        return replace(session, token.name, newcomer, admission)
    name = names.free_name(session, token.name, asked, admission.now) if token.kind == BATCH else token.name
    place = (token.group, token.labels)
    return admit(session, name, newcomer, admission, place=place, by={"token": token.id})


def admit(
    session: Session,
    name: str,
    newcomer: Newcomer,
    admission: Admission,
    *,
    place: tuple[str, dict[str, str]],
    by: dict[str, object],
) -> Admitted:
    """Add a board whose identity is known to be new. ``place`` is group and labels; ``by`` says what admitted it.

    Raises:
        RefusedError: ``enrolment.identity_taken`` when the name belongs to a board, ``enrolment.csr_refused``.
    """
    if session.get(Device, name) is not None:
        raise _taken(name, name)
    now, issued = admission.now, _issue(name, newcomer, admission)
    group, labels = place
    device = Device(
        id=name,
        name=name,
        group=group,
        labels=labels,
        identity_public=newcomer.identity,
        state=ENROLLED,
        enrolled_at=now,
        cert_serial=issued.serial,
        cert_not_after=issued.not_after,
        inventory={},
        status={},
    )
    session.add(device)
    session.flush()
    keep_certificate(session, device, issued, now)
    detail = {"serial": issued.serial, "group": group, "fingerprint": key_fingerprint(newcomer.identity), **by}
    record_event(session, now, actor(name), "device.enrol", name, detail=detail)
    return Admitted(name, issued.pem)


def replace(session: Session, name: str, newcomer: Newcomer, admission: Admission) -> Admitted:
    """Give a known name to another board: group, labels, history, and desired state stay, and nothing else does.

    From the commit on the earlier identity speaks for nobody, its certificates are revoked, and what counts the
    earlier board's connections and reports begins anew.

    Raises:
        RefusedError: ``enrolment.csr_refused``.
    """
    device = session.get_one(Device, name, with_for_update=True)
    now, issued = admission.now, _issue(name, newcomer, admission)
    revoke_certificates(session, name, now)
    earlier = device.identity_public
    session.add(
        RetiredIdentity(
            identity_public=earlier, device_id=name, since=device.identity_since or device.enrolled_at, until=now
        )
    )
    device.identity_public, device.identity_since, device.state = newcomer.identity, now, ENROLLED
    device.online, device.connection, device.agent_version = False, 0, ""
    device.status, device.inventory = {}, {}
    report = session.get(ReportState, name, with_for_update=True)
    if report is not None:
        report.revision, report.epoch, report.report = 0, "", {}
    session.flush()
    keep_certificate(session, device, issued, now)
    boards.begin_anew(session, name, admission.director, now)
    detail = {
        "serial": issued.serial,
        "fingerprint": key_fingerprint(newcomer.identity),
        "earlier_fingerprint": key_fingerprint(earlier),
    }
    record_event(session, now, actor(name), "device.rotate", name, detail=detail)
    return Admitted(name, issued.pem, replaced=True)


def repeat(session: Session, name: str, newcomer: Newcomer, admitted_at: datetime, admission: Admission) -> Admitted:
    """Answer an enrolment again for the key that it admitted; the first answer may have been lost.

    Raises:
        RefusedError: ``enrolment.csr_refused``, ``renewal.too_often``; ``enrolment.token_used`` when the board is
            revoked or replaced since, or ``REPEAT_WINDOW`` is over.
    """
    now, device = admission.now, session.get(Device, name, with_for_update=True)
    mine = device is not None and device.identity_public == newcomer.identity and device.state == ENROLLED
    if device is None or not mine or now - admitted_at > REPEAT_WINDOW:
        raise _token_refused("enrolment.token_used", f"{name} was enrolled with this already", name)
    check_rate(session, name, now)
    issued = _issue(name, newcomer, admission)
    keep_certificate(session, device, issued, now)
    record_event(session, now, actor(name), "device.enrol.repeat", name, detail={"serial": issued.serial})
    return Admitted(name, issued.pem)


def check_proof(identity: str, token: str, csr_pem: str, proof: str) -> None:
    """Return if the identity key signed token and CSR.

    Raises:
        RefusedError: ``enrolment.bad_proof``.
    """
    if not keys.verify(identity, bytes.fromhex(proof), proof_bytes(token, csr_pem)):
        raise RefusedError(
            "enrolment.bad_proof", "the identity key did not sign this request", hint="run `garrison-agent enroll` anew"
        )


def check_identity_is_new(session: Session, identity: str, device_id: str | None) -> None:
    """Return if ``identity`` never spoke for a board.

    Raises:
        RefusedError: ``enrolment.identity_taken`` or ``enrolment.identity_retired``.
    """
    other = session.scalar(select(Device).where(Device.identity_public == identity))
    if other is not None:
        raise _taken(other.id, device_id)
    retired = session.get(RetiredIdentity, identity)
    if retired is not None:
        raise RefusedError(
            "enrolment.identity_retired",
            f"this identity key spoke for {retired.device_id} until it was replaced",
            hint="clear the board's identity folder, so that it makes new keys, and enrol it anew",
            device=device_id,
        )


def _check_token(token: EnrolmentToken, now: datetime) -> None:
    whom = f"{token.name}*" if token.kind == BATCH else token.name
    board = None if token.kind == BATCH else token.name
    if token.revoked_at is not None:
        raise _token_refused("enrolment.token_revoked", f"the enrolment token for {whom} was revoked", board)
    if token.uses >= token.uses_max:
        most = f" by {token.uses_max} boards" if token.kind == BATCH else ""
        raise _token_refused("enrolment.token_used", f"the enrolment token for {whom} was used already{most}", board)
    if now >= token.expires_at:
        raise _token_refused("enrolment.token_expired", f"the enrolment token for {whom} has ended", board)


def _issue(name: str, newcomer: Newcomer, admission: Admission) -> Issued:
    return admission.authority.issue_device(name, newcomer.csr_pem, admission.days, admission.now)


def _taken(owner: str, device_id: str | None) -> RefusedError:
    return RefusedError(
        "enrolment.identity_taken",
        f"this identity key, or the name {owner}, belongs to board {owner}",
        hint="one board has one name; to rename it, clear its identity folder and enrol it anew",
        device=device_id,
    )


def _token_refused(code: str, message: str, device: str | None) -> RefusedError:
    return RefusedError(
        code, message, hint="make a new one with `garrison device token create` and enrol with that", device=device
    )
