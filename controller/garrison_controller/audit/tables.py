"""What boards' streams brought home, what was refused, and what does not add up."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from garrison_controller.db.base import Base


class StreamState(Base):
    """How far one stream of one board has come within one epoch."""

    __tablename__ = "stream_state"

    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), primary_key=True)
    stream: Mapped[str] = mapped_column(String(16), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(16), primary_key=True)
    up_to: Mapped[int] = mapped_column(BigInteger, default=0)
    """Every row up to here is stored, or was declared dropped by the board."""
    hash: Mapped[str | None] = mapped_column(String(64))
    rows: Mapped[int] = mapped_column(BigInteger, default=0)
    dropped: Mapped[int] = mapped_column(BigInteger, default=0)
    """Rows that the board thinned before it could send them."""
    duplicates: Mapped[int] = mapped_column(BigInteger, default=0)
    """Rows that came again and changed nothing."""
    opened_at: Mapped[datetime]
    received_at: Mapped[datetime | None]


class StreamRow(Base):
    """One row: ``header`` and ``body`` are the exact text that was hashed on the board."""

    __tablename__ = "stream_row"
    __table_args__ = (
        ForeignKeyConstraint(
            ["device_id", "stream", "epoch"], ["stream_state.device_id", "stream_state.stream", "stream_state.epoch"]
        ),
        Index("ix_stream_row_device_id_stream_time_ms", "device_id", "stream", "time_ms"),
    )

    device_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    stream: Mapped[str] = mapped_column(String(16), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(16), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    hash: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(64))
    """The header's ``y``, for queries; verification reads the header alone."""
    time_ms: Mapped[int] = mapped_column(BigInteger)
    """The header's ``t``: the board's clock, in ms since 1970; information, never a decision."""
    header: Mapped[str] = mapped_column(Text)
    body: Mapped[str | None] = mapped_column(Text)
    salt: Mapped[str | None] = mapped_column(String(32))
    received_at: Mapped[datetime]


class Alarm(Base):
    """Something that cannot happen while everyone is honest and no store was lost."""

    __tablename__ = "alarm"
    __table_args__ = (UniqueConstraint("device_id", "code", "subject"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), index=True)
    code: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(256))
    """What it is about; the same alarm about the same subject is counted, not repeated."""
    message: Mapped[str] = mapped_column(Text)
    detail: Mapped[dict[str, object]] = mapped_column(default=dict)
    first_at: Mapped[datetime]
    last_at: Mapped[datetime] = mapped_column(index=True)
    count: Mapped[int] = mapped_column(BigInteger, default=1)


class Refusal(Base):
    """How many messages were refused, by sender and code."""

    __tablename__ = "refusal"

    sender: Mapped[str] = mapped_column(String(63), primary_key=True)
    """The device id; empty where no enrolled board sent it."""
    code: Mapped[str] = mapped_column(String(128), primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger, default=0)
    last_at: Mapped[datetime]
    last_message: Mapped[str] = mapped_column(Text, default="")


class ReportState(Base):
    """The newest report of one board."""

    __tablename__ = "report_state"

    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, default=0)
    epoch: Mapped[str] = mapped_column(String(16), default="")
    """The newest epoch of the board's audit stream: another one means another store, whose counts begin anew."""
    report: Mapped[dict[str, object]] = mapped_column(default=dict)
    """``messages.report.Report`` as last received."""
    received_at: Mapped[datetime | None]
