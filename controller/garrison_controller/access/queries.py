"""Every select of access control."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.rules import GrantFacts, Role
from garrison_controller.access.tables import AdminEvent, Grant, Principal, Token
from garrison_protocol.errors import NotFoundError


def principal_by_name(session: Session, name: str) -> Principal | None:
    """Return the principal called ``name``."""
    return session.scalar(select(Principal).where(Principal.name == name))


def get_principal(session: Session, name: str) -> Principal:
    """Return the principal called ``name``.

    Raises:
        NotFoundError: ``access.principal_not_found``.
    """
    principal = principal_by_name(session, name)
    if principal is None:
        raise NotFoundError(
            "access.principal_not_found", f"no principal {name[:80]}", hint="see `garrison access list`"
        )
    return principal


def principals(session: Session) -> list[Principal]:
    """Return every principal, by name."""
    return list(session.scalars(select(Principal).order_by(Principal.name)))


def grants(session: Session) -> list[Grant]:
    """Return every grant."""
    return list(session.scalars(select(Grant).order_by(Grant.scope, Grant.role)))


def tokens(session: Session) -> list[Token]:
    """Return every token, newest last."""
    return list(session.scalars(select(Token).order_by(Token.created_at)))


def grants_of(session: Session, principal_id: str) -> tuple[GrantFacts, ...]:
    """Return the grants of one principal, expired ones included."""
    rows = session.scalars(select(Grant).where(Grant.principal_id == principal_id))
    return tuple(GrantFacts(Role(row.role), row.scope, row.expires_at) for row in rows)


def events(session: Session, *, after: int = 0, limit: int = 100) -> list[AdminEvent]:
    """Return administrative events with an id above ``after``, oldest first."""
    return list(session.scalars(select(AdminEvent).where(AdminEvent.id > after).order_by(AdminEvent.id).limit(limit)))
