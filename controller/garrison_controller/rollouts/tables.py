"""Rollouts, their groups and boards, approvals, and the desired state of every board."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Connection,
    ForeignKey,
    ForeignKeyConstraint,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
)
from sqlalchemy.orm import Mapped, mapped_column

from garrison_controller.db.base import Base
from garrison_controller.rollouts import four_eyes
from garrison_controller.rollouts.states import Decision, GroupStatus, RolloutStatus, TargetState


def _one_of(column: str, values: type[RolloutStatus | GroupStatus | TargetState | Decision]) -> CheckConstraint:
    listed = ", ".join(f"'{value.value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class Rollout(Base):
    """One change for many boards. What ``digest`` covers never changes after creation."""

    __tablename__ = "rollout"
    __table_args__ = (
        _one_of("status", RolloutStatus),
        CheckConstraint("success_threshold BETWEEN 1 AND 100", name="success_threshold"),
        CheckConstraint("error_threshold BETWEEN 0 AND 100", name="error_threshold"),
        CheckConstraint("min_executed >= 1", name="min_executed"),
        CheckConstraint("max_unavailable IS NULL OR max_unavailable >= 1", name="max_unavailable"),
        CheckConstraint("queued_timeout_s >= 1 AND in_progress_timeout_s >= 1", name="timeouts"),
    )

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    alias: Mapped[str] = mapped_column(String(128))
    package_name: Mapped[str] = mapped_column(String(128))
    package_version: Mapped[str] = mapped_column(String(64))
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    scope: Mapped[str] = mapped_column(String(256), default="/")
    """Group path: boards elsewhere are never touched, and rights are needed on all of it."""
    target_filter: Mapped[str] = mapped_column(String(512), default="*")
    status: Mapped[str] = mapped_column(String(24), default=RolloutStatus.WAITING_FOR_APPROVAL, index=True)
    soak_s: Mapped[float]
    limits: Mapped[dict[str, object]] = mapped_column(default=dict)
    """``messages.desired.GateLimits``."""
    success_threshold: Mapped[int]
    error_threshold: Mapped[int]
    min_executed: Mapped[int]
    queued_timeout_s: Mapped[int]
    in_progress_timeout_s: Mapped[int]
    max_unavailable: Mapped[int | None]
    start_on_approval: Mapped[bool] = mapped_column(default=True)
    created_by: Mapped[str] = mapped_column(String(32))
    published_by: Mapped[str] = mapped_column(String(32))
    """Principal ids of the rollout's creator and of the package's publisher."""
    created_at: Mapped[datetime]
    digest: Mapped[str] = mapped_column(String(64))
    pause_reason: Mapped[str] = mapped_column(Text, default="")
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class RolloutGroup(Base):
    """Boards that change together. Selected by ``filter``, or as ``percent`` of all the rollout's boards."""

    __tablename__ = "rollout_group"
    __table_args__ = (
        _one_of("status", GroupStatus),
        CheckConstraint("(filter IS NULL) <> (percent IS NULL)", name="one_selection"),
        UniqueConstraint("rollout_id", "name"),
    )

    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollout.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    filter: Mapped[str | None] = mapped_column(String(512))
    percent: Mapped[int | None]
    status: Mapped[str] = mapped_column(String(24), default=GroupStatus.SCHEDULED)
    accepted_failures: Mapped[int] = mapped_column(default=0)
    """Failures that were there when an operator resumed the rollout; they do not pause it again."""
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Target(Base):
    """One board of a started rollout."""

    __tablename__ = "rollout_target"
    __table_args__ = (
        _one_of("state", TargetState),
        ForeignKeyConstraint(["rollout_id", "position"], ["rollout_group.rollout_id", "rollout_group.position"]),
    )

    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollout.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), primary_key=True, index=True)
    position: Mapped[int]
    """Its group."""
    state: Mapped[str] = mapped_column(String(24), default=TargetState.SCHEDULED)
    deployment: Mapped[str | None] = mapped_column(String(24))
    """The board's own word, a ``DeploymentState``."""
    step: Mapped[int] = mapped_column(BigInteger, default=0)
    variant: Mapped[str | None] = mapped_column(String(128))
    error_code: Mapped[str | None] = mapped_column(String(128))
    message: Mapped[str | None] = mapped_column(Text)
    progress_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    total_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    evaluation: Mapped[dict[str, object]] = mapped_column(default=dict)
    previous: Mapped[dict[str, object]] = mapped_column(default=dict)
    """The assignment that stop and withdrawal restore (``desired.to_document``); empty: none."""
    assigned_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    heard_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Approval(Base):
    """An approver's decision about one exact rollout. Rows are only ever added."""

    __tablename__ = "rollout_approval"
    __table_args__ = (_one_of("decision", Decision), UniqueConstraint("rollout_id", "principal_id"))

    id: Mapped[int] = mapped_column(primary_key=True)
    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollout.id"), index=True)
    principal_id: Mapped[str] = mapped_column(ForeignKey("principal.id"))
    digest: Mapped[str] = mapped_column(String(64))
    decision: Mapped[str] = mapped_column(String(8))
    comment: Mapped[str] = mapped_column(Text, default="")
    at: Mapped[datetime]


class Assignment(Base):
    """What one board should serve under one alias."""

    __tablename__ = "assignment"

    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(128), primary_key=True)
    package_name: Mapped[str] = mapped_column(String(128))
    package_version: Mapped[str] = mapped_column(String(64))
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollout.id"), index=True)
    soak_s: Mapped[float]
    limits: Mapped[dict[str, object]] = mapped_column(default=dict)
    start_by: Mapped[int | None] = mapped_column(BigInteger)
    loaded: Mapped[bool] = mapped_column(default=True)


class DesiredState(Base):
    """The newest signed desired state of one board."""

    __tablename__ = "desired_state"

    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), primary_key=True)
    counter: Mapped[int] = mapped_column(BigInteger, default=0)
    """0: none was signed yet."""
    counter_floor: Mapped[int] = mapped_column(BigInteger, default=0)
    """The highest counter that the board was seen with; the next one signed lies above both."""
    body: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    envelope: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    sha256: Mapped[str] = mapped_column(String(64), default="")
    """Of ``body``: what the board's status carries."""
    published_at: Mapped[datetime | None] = mapped_column(index=True)
    """When the broker confirmed this counter; None: to be published."""


def _protect(table: Table, connection: Connection, **_: object) -> None:
    for statement in four_eyes.statements(connection.dialect.name, table.name):
        connection.exec_driver_sql(statement)


for _protected in (Rollout, RolloutGroup, Approval):
    event.listen(_protected.__table__, "after_create", _protect)
