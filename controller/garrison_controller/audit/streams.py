"""Appending boards' batches: exactly once, in order, each row checked (docs/protocol.md, "Streams and receipts").

Runs inside the caller's transaction; the receipt that it returns may leave only after the commit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from garrison_controller.audit.alarms import raise_alarm
from garrison_controller.audit.tables import ReportState, StreamRow, StreamState
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts.tables import Target
from garrison_protocol import chain
from garrison_protocol.errors import InvalidError
from garrison_protocol.messages.report import Head
from garrison_protocol.messages.streams import Batch, Receipt, Row
from garrison_protocol.states import Stream

MAX_SEQUENCE = 2**53
MAX_KIND_LENGTH = 64


@dataclass(frozen=True, slots=True)
class _Facts:
    """What queries need of a header; the chain's check reads the rest."""

    kind: str
    time_ms: int


def append(session: Session, batch: Batch, now: datetime) -> Receipt:
    """Store the rows of ``batch`` that are new, and return what the board may forget.

    Rows that are stored already change nothing. A gap is answered by asking for what is missing. A row that
    contradicts a stored one, or does not follow from it, is an alarm, and nothing of the batch is stored.

    Raises:
        InvalidError: ``stream.out_of_range``, or ``message.malformed`` for text that no database takes.
    """
    if batch.first + len(batch.rows) > MAX_SEQUENCE or batch.dropped > MAX_SEQUENCE:
        raise InvalidError("stream.out_of_range", f"a batch that begins at {batch.first}")
    if any("\x00" in row.header or "\x00" in (row.body or "") for row in batch.rows):
        raise InvalidError("message.malformed", "a row holds NUL characters")
    state = open_epoch(session, batch.device, batch.stream, batch.epoch, now)
    due = state.up_to + 1
    dropped = batch.first - due if batch.stream is not Stream.AUDIT and 0 < batch.first - due <= batch.dropped else 0
    if batch.first > due + dropped:
        return _receipt(state, resend=True)
    entries = [_entry(row, batch.first + place) for place, row in enumerate(batch.rows)]
    fault = _contradiction(session, state, entries) or _break(state, batch, entries, due)
    if fault is not None:
        seq, code, what = fault
        raise_alarm(
            session,
            batch.device,
            code,
            subject=f"{batch.stream.value}/{batch.epoch}/{seq}",
            message=f"{batch.stream.value} row {seq} of epoch {batch.epoch}: {what}",
            now=now,
            detail={"stream": batch.stream.value, "epoch": batch.epoch, "seq": seq},
        )
        return _receipt(state)
    new = [entry for entry in entries if entry.seq >= due]
    state.duplicates += len(entries) - len(new)
    state.received_at = now
    if new:
        session.execute(insert(StreamRow), [_row(batch, entry, now) for entry in new])
        state.up_to, state.hash = new[-1].seq, new[-1].hash
        state.rows += len(new)
        state.dropped += dropped
    return _receipt(state)


def open_epoch(session: Session, device: str, stream: Stream, epoch: str, now: datetime) -> StreamState:
    """Return where the stream stands in ``epoch``, from the beginning if it was never heard of.

    Another audit epoch than before means that the board's store was lost, or put back from an older copy: its reports,
    connections, and steps count from 1 again, and that is an alarm, since what the lost store had not sent is lost too.
    """
    state = session.get(StreamState, (device, stream.value, epoch), with_for_update=True)
    if state is not None:
        return state
    state = StreamState(
        device_id=device,
        stream=stream.value,
        epoch=epoch,
        up_to=0,
        hash=None,
        rows=0,
        dropped=0,
        duplicates=0,
        opened_at=now,
    )
    session.add(state)
    session.flush()
    if stream is Stream.AUDIT:
        _note_store(session, device, epoch, now)
    return state


def contradicts(session: Session, device: str, stream: Stream, head: Head) -> bool:
    """Tell whether the row stored at the place of ``head`` has another hash than the board now claims."""
    stored = session.scalar(
        select(StreamRow.hash).where(
            StreamRow.device_id == device,
            StreamRow.stream == stream.value,
            StreamRow.epoch == head.epoch,
            StreamRow.seq == head.seq,
        )
    )
    return stored is not None and stored != head.hash


def _note_store(session: Session, device: str, epoch: str, now: datetime) -> None:
    report = session.get(ReportState, device)
    if report is None:
        session.add(ReportState(device_id=device, revision=0, epoch=epoch, report={}))
        session.flush()
        return
    if report.epoch:
        raise_alarm(
            session,
            device,
            "audit.store_lost",
            subject=epoch,
            message=f"{device} opened audit epoch {epoch}: its store was lost, or put back from an older copy, "
            "with everything in between that had not arrived",
            now=now,
            detail={"epoch": epoch, "before": report.epoch},
        )
        report.revision = 0
        session.get_one(Device, device).connection = 0
        for target in session.scalars(select(Target).where(Target.device_id == device)):
            target.step = 0
    report.epoch = epoch


def _entry(row: Row, seq: int) -> chain.Entry:
    return chain.Entry(seq, chain.header_hash(row.header), row.header, row.body, row.salt)


def _contradiction(session: Session, state: StreamState, entries: list[chain.Entry]) -> tuple[int, str, str] | None:
    """Return the first entry that is stored with another hash. Rows below ``up_to`` without a row were dropped."""
    known = [entry for entry in entries if entry.seq <= state.up_to]
    if not known:
        return None
    stored = dict(
        session.execute(
            select(StreamRow.seq, StreamRow.hash).where(
                StreamRow.device_id == state.device_id,
                StreamRow.stream == state.stream,
                StreamRow.epoch == state.epoch,
                StreamRow.seq.between(known[0].seq, known[-1].seq),
            )
        ).all()
    )
    for entry in known:
        if stored.get(entry.seq, entry.hash) != entry.hash:
            return entry.seq, "stream.fork", "the board sent two different rows under one number"
    return None


def _break(state: StreamState, batch: Batch, entries: list[chain.Entry], due: int) -> tuple[int, str, str] | None:
    """Return the first new entry that does not hold at its place."""
    chained = batch.stream is Stream.AUDIT
    previous = state.hash or chain.genesis(batch.device, batch.stream.value, batch.epoch)
    for entry in entries:
        if entry.seq < due:
            continue
        what = chain.check(
            entry,
            device=batch.device,
            epoch=batch.epoch,
            seq=entry.seq,
            previous=previous if chained else None,
        )
        if what is not None:
            return entry.seq, "stream.broken", what
        previous = entry.hash
    return None


def _row(batch: Batch, entry: chain.Entry, now: datetime) -> dict[str, object]:
    facts = header_facts(entry.header)
    return {
        "device_id": batch.device,
        "stream": batch.stream.value,
        "epoch": batch.epoch,
        "seq": entry.seq,
        "hash": entry.hash,
        "kind": facts.kind,
        "time_ms": facts.time_ms,
        "header": entry.header,
        "body": entry.body,
        "salt": entry.salt,
        "received_at": now,
    }


def header_facts(header: str) -> _Facts:
    """Return kind and time of a header that ``chain.check`` accepted; what is missing or absurd becomes empty or 0."""
    document = json.loads(header)
    kind, time_ms = document.get("y"), document.get("t")
    return _Facts(
        kind=kind.replace("\x00", "")[:MAX_KIND_LENGTH] if isinstance(kind, str) else "",
        time_ms=time_ms if isinstance(time_ms, int) and abs(time_ms) < MAX_SEQUENCE else 0,
    )


def _receipt(state: StreamState, *, resend: bool = False) -> Receipt:
    return Receipt(
        device=state.device_id,
        stream=Stream(state.stream),
        epoch=state.epoch,
        up_to=state.up_to,
        hash=state.hash,
        resend=resend,
    )
