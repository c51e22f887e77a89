"""Boards, their identities and certificates, and what admits them: tokens and requests that wait for approval."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from garrison_controller.db.base import Base

ENROLLED = "enrolled"
REVOKED = "revoked"

SINGLE = "single"
BATCH = "batch"
ROTATE = "rotate"
"""Kinds of enrolment tokens."""

PENDING = "pending"
APPROVED = "approved"
DENIED = "denied"
ADMITTED = "admitted"
"""Where a request for enrolment without a token stands."""


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
    identity_since: Mapped[datetime | None]
    """When ``identity_public`` replaced an earlier key (``garrison device rotate``); None: it is the board's first."""
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
    """Every certificate that a device CA signed for a board: what a revocation list must name."""

    __tablename__ = "issued_certificate"

    serial: Mapped[str] = mapped_column(String(40), primary_key=True)
    issuer: Mapped[str] = mapped_column(String(64), index=True)
    """SHA-256 of the authority's certificate, in hex."""
    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), index=True)
    not_after: Mapped[datetime]
    issued_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class RetiredIdentity(Base):
    """A key that spoke for a board until another replaced it. It never speaks for any board again."""

    __tablename__ = "retired_identity"

    identity_public: Mapped[str] = mapped_column(String(64), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), index=True)
    since: Mapped[datetime]
    until: Mapped[datetime]


class EnrolmentToken(Base):
    """Permission to enrol: for one board, for up to ``uses_max`` boards, or for the next identity of a known board.

    Only the token's hash is stored.
    """

    __tablename__ = "enrolment_token"
    __table_args__ = (
        CheckConstraint("kind IN ('single', 'batch', 'rotate')", name="kind"),
        CheckConstraint("uses BETWEEN 0 AND uses_max", name="uses"),
        CheckConstraint("(kind = 'batch') OR (uses_max = 1)", name="one_board"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[str] = mapped_column(String(8), default=SINGLE)
    name: Mapped[str] = mapped_column(String(63), index=True)
    """The board's id; of a batch, what every id begins with."""
    group: Mapped[str] = mapped_column("group_path", String(256))
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    uses: Mapped[int] = mapped_column(default=0)
    uses_max: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    created_by: Mapped[str] = mapped_column(String(64))


class TokenUse(Base):
    """Which identity a token admitted as what: an enrolment whose answer was lost is recognised by it."""

    __tablename__ = "token_use"
    __table_args__ = (UniqueConstraint("identity_public"),)

    token_id: Mapped[int] = mapped_column(ForeignKey("enrolment_token.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), primary_key=True)
    identity_public: Mapped[str] = mapped_column(String(64))
    used_at: Mapped[datetime]


class EnrolmentRequest(Base):
    """A board that came with an invitation, or whose request was carried here: it waits for an operator's decision."""

    __tablename__ = "enrolment_request"
    __table_args__ = (CheckConstraint("state IN ('pending', 'approved', 'denied', 'admitted')", name="state"),)

    identity_public: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(39), unique=True)
    """``messages.enrolment.key_fingerprint``: what people compare, and name the request by."""
    asked_name: Mapped[str] = mapped_column(String(63), default="")
    address: Mapped[str] = mapped_column(String(64), default="")
    """Where the request came from, as the controller saw it; information, never a decision."""
    state: Mapped[str] = mapped_column(String(8), default=PENDING, index=True)
    device_id: Mapped[str] = mapped_column(String(63), default="", index=True)
    """What the approver named the board."""
    group: Mapped[str] = mapped_column("group_path", String(256), default="/")
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    asked_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    decided_at: Mapped[datetime | None]
    decided_by: Mapped[str] = mapped_column(String(64), default="")
