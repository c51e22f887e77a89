"""Names, groups and labels of boards to come: what is well-formed, what is free."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.rules import check_scope
from garrison_controller.devices.tables import APPROVED, SINGLE, Device, EnrolmentRequest, EnrolmentToken
from garrison_protocol.errors import ConflictError, InvalidError
from garrison_protocol.ids import is_device_id

MAX_LABELS = 32
MAX_LABEL_LENGTH = 64
MAX_PREFIX_LENGTH = 56


def check_place(group: str, labels: dict[str, str]) -> None:
    """Return if a board may be in ``group`` and have ``labels``.

    Raises:
        InvalidError: ``access.scope_malformed``, ``device.labels_malformed``.
    """
    check_scope(group)
    if len(labels) > MAX_LABELS or any(
        not key or len(key) > MAX_LABEL_LENGTH or len(value) > MAX_LABEL_LENGTH or set(key + value) & set(",=*!\n")
        for key, value in labels.items()
    ):
        raise InvalidError(
            "device.labels_malformed",
            "a label is empty, too long, or holds one of , = * !",
            hint=f"use at most {MAX_LABELS} labels like site=berlin, each part at most {MAX_LABEL_LENGTH} characters",
        )


def check_name(name: str) -> None:
    """Return if ``name`` may name a board.

    Raises:
        InvalidError: ``device.name_malformed``.
    """
    if not is_device_id(name):
        raise InvalidError(
            "device.name_malformed",
            f"{name[:80]!r} cannot name a board",
            hint="use lower-case letters, digits and '-', at most 63; not beginning with 'controller'",
        )


def check_prefix(prefix: str) -> None:
    """Return if ``prefix`` followed by a number may name boards.

    Raises:
        InvalidError: ``device.prefix_malformed``.
    """
    if not prefix or len(prefix) > MAX_PREFIX_LENGTH or not is_device_id(f"{prefix}1"):
        raise InvalidError(
            "device.prefix_malformed",
            f"{prefix[:80]!r} cannot begin the names of boards",
            hint=f"use something like edge- : lower-case letters, digits and '-', at most {MAX_PREFIX_LENGTH}",
        )


def check_free(session: Session, name: str, now: datetime, *, but: str = "") -> None:
    """Return if no board has ``name`` and no other approved request (of identity ``but``) waits to get it.

    Raises:
        ConflictError: ``device.name_taken``; a name stays with its board, or histories would mix.
    """
    if session.get(Device, name) is not None:
        raise ConflictError(
            "device.name_taken",
            f"a board {name} is known already",
            hint=f"choose another name; or replace that board, keeping its history: `garrison device rotate {name}`",
        )
    if name in _promised(session, name, now, but=but):
        raise ConflictError(
            "device.name_taken",
            f"the name {name} is promised to a board whose request was approved",
            hint="choose another name; see `garrison device enroll list`",
        )


def check_not_given_out(session: Session, name: str, now: datetime) -> None:
    """Return if no enrolment token for ``name`` alone may still be used: its board would find the name taken.

    Raises:
        ConflictError: ``device.name_taken``.
    """
    if name in _given_out(session, name, now):
        raise ConflictError(
            "device.name_taken",
            f"an enrolment token for the name {name} may still be used",
            hint="choose another name, or end that token: `garrison device token list`",
        )


def free_name(session: Session, prefix: str, asked: str, now: datetime) -> str:
    """Return what a board of a batch is called: what it asked for, if that fits and is free, or else a number."""
    taken = set(session.scalars(select(Device.id).where(Device.id.startswith(prefix, autoescape=True))))
    taken |= _promised(session, prefix, now) | _given_out(session, prefix, now)
    if asked.startswith(prefix) and is_device_id(asked) and asked not in taken:
        return asked
    number = 1
    while f"{prefix}{number}" in taken:
        number += 1
    return f"{prefix}{number}"


def _given_out(session: Session, prefix: str, now: datetime) -> set[str]:
    return set(
        session.scalars(
            select(EnrolmentToken.name).where(
                EnrolmentToken.kind == SINGLE,
                EnrolmentToken.name.startswith(prefix, autoescape=True),
                EnrolmentToken.uses == 0,
                EnrolmentToken.revoked_at.is_(None),
                EnrolmentToken.expires_at > now,
            )
        )
    )


def _promised(session: Session, prefix: str, now: datetime, *, but: str = "") -> set[str]:
    return set(
        session.scalars(
            select(EnrolmentRequest.device_id).where(
                EnrolmentRequest.state == APPROVED,
                EnrolmentRequest.device_id.startswith(prefix, autoescape=True),
                EnrolmentRequest.expires_at > now,
                EnrolmentRequest.identity_public != but,
            )
        )
    )
