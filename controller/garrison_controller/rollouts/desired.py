"""Desired state: assignments become one signed, counted document per board (docs/protocol.md, "Desired state").

Every function runs inside the caller's transaction; the bus publishes afterwards what has no ``published_at``.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.rollouts.tables import Assignment, DesiredState
from garrison_protocol import envelope
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import KIND, Desired, DesiredAlias, GateLimits

_FIELDS = (
    "package_name",
    "package_version",
    "manifest_sha256",
    "rollout_id",
    "soak_s",
    "limits",
    "loaded",
)


def to_document(assignment: Assignment | None) -> dict[str, object]:
    """Return what ``restore`` needs to bring ``assignment`` back; empty for none.

    ``start_by`` is left out: the board has begun it already, and may have to go back to it at any time.
    """
    if assignment is None:
        return {}
    return {field: getattr(assignment, field) for field in _FIELDS}


def assign(session: Session, device: str, alias: str, values: dict[str, object]) -> None:
    """Set what ``device`` serves under ``alias``; empty ``values`` take the alias away."""
    current = session.get(Assignment, (device, alias))
    if not values:
        if current is not None:
            session.delete(current)
        return
    if current is None:
        current = Assignment(device_id=device, alias=alias)
        session.add(current)
    for field in _FIELDS:
        setattr(current, field, values[field])
    current.start_by = _optional_int(values.get("start_by"))


def issue(session: Session, devices: Iterable[str], director: SigningKey, now: datetime) -> None:
    """Sign a newer desired state for each board from its assignments; it counts as unpublished.

    The counter lies above every counter that the controller signed or saw the board with.
    """
    session.flush()
    for device in sorted(set(devices)):
        row = _locked(session, device)
        row.counter = max(row.counter, row.counter_floor) + 1
        assignments = session.scalars(
            select(Assignment).where(Assignment.device_id == device).order_by(Assignment.alias)
        ).all()
        body = encode(
            Desired(
                device=device,
                sent_at=int(now.timestamp() * 1000),
                counter=row.counter,
                aliases=tuple(_alias(assignment) for assignment in assignments),
            )
        )
        row.body, row.envelope, row.sha256 = body, envelope.seal(KIND, body, director), sha256_hex(body)
        row.published_at = None


def resign(session: Session, director: SigningKey, *, after: str, limit: int) -> list[str]:
    """Sign again, with the same body and counter, what another key than ``director`` has signed.

    Looks at ``limit`` boards in order of their names after ``after`` and returns them. To a board this is a repetition
    of what it has, so nothing changes there; but one that knows only the new key can believe it.
    """
    statement = (
        select(DesiredState)
        .where(DesiredState.counter > 0, DesiredState.device_id > after)
        .order_by(DesiredState.device_id)
        .limit(limit)
        .with_for_update()
    )
    rows = session.scalars(statement).all()
    for row in rows:
        if director.key_id not in envelope.signers(row.envelope):
            row.envelope, row.published_at = envelope.seal(KIND, row.body, director), None
    return [row.device_id for row in rows]


def raise_floor(session: Session, device: str, counter: int) -> None:
    """Keep every later desired state of ``device`` above ``counter``. Nothing is signed or published by this."""
    row = _locked(session, device)
    row.counter_floor = max(row.counter_floor, counter)


def _locked(session: Session, device: str) -> DesiredState:
    row = session.get(DesiredState, device, with_for_update=True)
    if row is None:
        row = DesiredState(device_id=device, counter=0, counter_floor=0, body=b"", envelope=b"", sha256="")
        session.add(row)
        session.flush()
    return row


def _alias(assignment: Assignment) -> DesiredAlias:
    return DesiredAlias(
        alias=assignment.alias,
        package=PackageRef(
            name=assignment.package_name,
            version=assignment.package_version,
            manifest_sha256=assignment.manifest_sha256,
        ),
        rollout=assignment.rollout_id,
        soak_s=assignment.soak_s,
        start_by=assignment.start_by,
        limits=GateLimits.model_validate(assignment.limits),
        loaded=assignment.loaded,
    )


def _optional_int(value: object) -> int | None:
    return value if isinstance(value, int) else None
