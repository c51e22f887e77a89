"""Enrolment tokens: made, listed, ended. Each function runs inside the caller's transaction."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.events import record_event
from garrison_controller.devices import names, queries
from garrison_controller.devices.tables import BATCH, ROTATE, SINGLE, EnrolmentToken
from garrison_protocol.errors import InvalidError, NotFoundError

MAX_USES = 10_000


def create_token(
    session: Session, actor: str, device_id: str, *, group: str, labels: dict[str, str], hours: int, now: datetime
) -> tuple[EnrolmentToken, str]:
    """Add permission for one board to enrol under ``device_id``, and return it with its secret, known only now.

    Earlier unused tokens for the same id end.

    Raises:
        InvalidError: ``device.name_malformed``, ``access.scope_malformed``, ``device.labels_malformed``.
        ConflictError: ``device.name_taken``.
    """
    names.check_name(device_id)
    names.check_place(group, labels)
    names.check_free(session, device_id, now)
    end_unused(session, device_id, SINGLE, now)
    token, secret = _add(session, actor, SINGLE, device_id, group=group, labels=labels, uses=1, hours=hours, now=now)
    record_event(session, now, actor, "device.token.create", device_id, detail={"group": group, "hours": hours})
    return token, secret


def create_batch(
    session: Session,
    actor: str,
    prefix: str,
    *,
    uses: int,
    group: str,
    labels: dict[str, str],
    hours: int,
    now: datetime,
) -> tuple[EnrolmentToken, str]:
    """Add permission for up to ``uses`` boards, whose names begin with ``prefix``; return it with its secret.

    Raises:
        InvalidError: ``device.prefix_malformed``, ``device.batch_size``, ``access.scope_malformed``,
            ``device.labels_malformed``.
    """
    names.check_prefix(prefix)
    names.check_place(group, labels)
    if not 1 <= uses <= MAX_USES:
        raise InvalidError("device.batch_size", f"a token for {uses} boards", hint=f"choose 1 to {MAX_USES} boards")
    token, secret = _add(session, actor, BATCH, prefix, group=group, labels=labels, uses=uses, hours=hours, now=now)
    detail = {"token": token.id, "group": group, "hours": hours, "uses": uses}
    record_event(session, now, actor, "device.token.create", f"{prefix}*", detail=detail)
    return token, secret


def create_rotation(
    session: Session, actor: str, device_id: str, *, hours: int, now: datetime
) -> tuple[EnrolmentToken, str]:
    """Add permission for one board to take over the name of an enrolled or revoked one; return it with its secret.

    Nothing changes for the present board before the other enrols. Earlier unused tokens of this kind end.

    Raises:
        NotFoundError: ``device.not_found``.
    """
    device = queries.get(session, device_id)
    end_unused(session, device_id, ROTATE, now)
    token, secret = _add(
        session, actor, ROTATE, device_id, group=device.group, labels=device.labels, uses=1, hours=hours, now=now
    )
    record_event(session, now, actor, "device.rotate.allow", device_id, detail={"hours": hours})
    return token, secret


def get_token(session: Session, token_id: int) -> EnrolmentToken:
    """Return a token.

    Raises:
        NotFoundError: ``device.token_not_found``.
    """
    token = session.get(EnrolmentToken, token_id, with_for_update=True)
    if token is None:
        raise NotFoundError(
            "device.token_not_found", f"no enrolment token {token_id}", hint="see `garrison device token list`"
        )
    return token


def revoke_token(session: Session, actor: str, token_id: int, now: datetime) -> EnrolmentToken:
    """End a token at once and return it; boards that it admitted stay. Doing it again changes nothing.

    Raises:
        NotFoundError: ``device.token_not_found``.
    """
    token = get_token(session, token_id)
    if token.revoked_at is None:
        token.revoked_at = now
        record_event(
            session, now, actor, "device.token.revoke", token.name, detail={"token": token.id, "kind": token.kind}
        )
    return token


def end_unused(session: Session, name: str, kind: str, now: datetime) -> None:
    """End every token of ``kind`` for ``name`` that nobody used."""
    for earlier in session.scalars(
        select(EnrolmentToken).where(
            EnrolmentToken.name == name,
            EnrolmentToken.kind == kind,
            EnrolmentToken.uses == 0,
            EnrolmentToken.revoked_at.is_(None),
        )
    ):
        earlier.revoked_at = now


def hash_secret(secret: str) -> str:
    """Return what is stored of a token."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _add(
    session: Session,
    actor: str,
    kind: str,
    name: str,
    *,
    group: str,
    labels: dict[str, str],
    uses: int,
    hours: int,
    now: datetime,
) -> tuple[EnrolmentToken, str]:
    secret = secrets.token_urlsafe(32)
    token = EnrolmentToken(
        token_sha256=hash_secret(secret),
        kind=kind,
        name=name,
        group=group,
        labels=labels,
        uses=0,
        uses_max=uses,
        created_at=now,
        expires_at=now + timedelta(hours=hours),
        created_by=actor,
    )
    session.add(token)
    session.flush()
    return token, secret
