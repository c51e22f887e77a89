"""Every select about telemetry."""

from __future__ import annotations

import json
from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.audit.tables import StreamRow
from garrison_controller.telemetry.rules import Sample, sample
from garrison_protocol.states import Stream

SAMPLE_KIND = "sample"
"""Rows of what the board measured of itself; others of the stream hold histograms (docs/protocol.md, "Telemetry")."""


def samples(session: Session, device: str, *, since_ms: int | None, limit: int) -> list[Sample]:
    """Return the board's newest samples by its own clock, the oldest of them first."""
    statement = (
        select(StreamRow)
        .where(StreamRow.device_id == device, StreamRow.stream == Stream.TELEMETRY, StreamRow.kind == SAMPLE_KIND)
        .order_by(StreamRow.time_ms.desc(), StreamRow.seq.desc())
        .limit(limit)
    )
    if since_ms is not None:
        statement = statement.where(StreamRow.time_ms >= since_ms)
    return list(_samples(reversed(session.scalars(statement).all())))


def _samples(rows: Iterable[StreamRow]) -> Iterable[Sample]:
    for row in rows:
        yield sample(row.epoch, row.seq, row.time_ms, json.loads(row.header))
