"""Boards and the one-time tokens that admit them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from garrison_controller.db.base import Base

ENROLLED = "enrolled"
REVOKED = "revoked"


class Device(Base):
    """A board. ``id`` is its common name at the broker; ``identity_public`` the key that signs its envelopes."""

    __tablename__ = "device"
    __table_args__ = (CheckConstraint("state IN ('enrolled', 'revoked')", name="state"),)

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    group: Mapped[str] = mapped_column("group_path", String(256), index=True)
    """A path such as ``/eu/plant1/``; grants and filters select by its prefix."""
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    identity_public: Mapped[str] = mapped_column(String(64), unique=True)
    state: Mapped[str] = mapped_column(String(16), default=ENROLLED)
    enrolled_at: Mapped[datetime]
    cert_serial: Mapped[str] = mapped_column(String(40))
    """Serial number of the newest certificate, in hex."""
    cert_not_after: Mapped[datetime]
    inventory: Mapped[dict[str, object]] = mapped_column(default=dict)
    """``messages.report.Inventory`` as the board last reported it."""
    last_seen_at: Mapped[datetime | None]
    online: Mapped[bool] = mapped_column(default=False)
    connection: Mapped[int] = mapped_column(default=0)
    """The newest connection number a signed status carried; deaths of older ones are ignored."""
    agent_version: Mapped[str] = mapped_column(String(64), default="")
    status: Mapped[dict[str, object]] = mapped_column(default=dict)
    """``messages.report.Status`` as last received."""


class IssuedCertificate(Base):
    """Every certificate the device CA signed for a board: what a revocation list must name."""

    __tablename__ = "issued_certificate"

    serial: Mapped[str] = mapped_column(String(40), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), index=True)
    not_after: Mapped[datetime]
    issued_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class EnrolmentToken(Base):
    """Permission for one board to enrol once. Only the token's hash is stored."""

    __tablename__ = "enrolment_token"

    id: Mapped[int] = mapped_column(primary_key=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    device_id: Mapped[str] = mapped_column(String(63), index=True)
    group: Mapped[str] = mapped_column("group_path", String(256))
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    created_by: Mapped[str] = mapped_column(String(64))
