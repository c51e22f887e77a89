"""Principals, their tokens and grants, and the record of administrative actions."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from garrison_controller.db.base import Base


class Principal(Base):
    """A person or a service that calls the API."""

    __tablename__ = "principal"
    __table_args__ = (CheckConstraint("kind IN ('person', 'service')", name="kind"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]


class Token(Base):
    """A bearer token: 256 random bits, of which only the SHA-256 is stored.

    It never reaches beyond ``scopes``, whatever its principal is granted later: a security-admin of one group could
    otherwise keep a token of somebody who is granted more elsewhere.
    """

    __tablename__ = "token"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    principal_id: Mapped[str] = mapped_column(ForeignKey("principal.id"), index=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    scopes: Mapped[list[str]]
    """Where its issuer could hand out rights when it was made; of a token made with a token, that one's."""


class Grant(Base):
    """A role within a scope."""

    __tablename__ = "role_grant"
    __table_args__ = (
        UniqueConstraint("principal_id", "role", "scope"),
        CheckConstraint("principal_id <> granted_by", name="not_to_oneself"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    principal_id: Mapped[str] = mapped_column(ForeignKey("principal.id"), index=True)
    role: Mapped[str] = mapped_column(String(32))
    scope: Mapped[str] = mapped_column(String(256))
    expires_at: Mapped[datetime | None]
    granted_by: Mapped[str] = mapped_column(String(32))
    """The granting principal's id; ``console`` for the first security-admin."""
    granted_at: Mapped[datetime]


class AdminEvent(Base):
    """What an administrator did, or was refused. Rows are only ever added."""

    __tablename__ = "admin_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    principal: Mapped[str] = mapped_column(String(128), index=True)
    """The principal's name at that time; ``console`` or ``device:<id>`` where no principal acts."""
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(512))
    outcome: Mapped[str] = mapped_column(String(16))
    """``done``, ``denied`` (no right) or ``refused`` (a trust or state rule)."""
    detail: Mapped[dict[str, object]] = mapped_column(default=dict)
