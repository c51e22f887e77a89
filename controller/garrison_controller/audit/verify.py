"""Recomputing every stored chain, and naming the first entry that does not hold.

Reads rows as a stream, in constant memory. Needs nothing but the rows: it also runs on a copy of the database.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import create_engine, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from garrison_controller.audit.streams import header_facts
from garrison_controller.audit.tables import ReportState, StreamRow, StreamState
from garrison_protocol import chain
from garrison_protocol.errors import InvalidError, NotFoundError
from garrison_protocol.states import Stream

ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Fault:
    """The first entry of a chain that does not hold."""

    seq: int
    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class ChainReport:
    """The verdict on one stream of one board within one epoch."""

    device: str
    stream: str
    epoch: str
    rows: int
    """Rows read, up to the first fault."""
    fault: Fault | None

    @property
    def ok(self) -> bool:
        """Tell whether every row holds and none is missing."""
        return self.fault is None

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        fault = None
        if self.fault is not None:
            fault = {"seq": self.fault.seq, "kind": self.fault.kind, "what": self.fault.what}
        return {
            "device": self.device,
            "stream": self.stream,
            "epoch": self.epoch,
            "rows": self.rows,
            "ok": self.ok,
            "first_bad": fault,
        }


def verify(session: Session, device: str | None = None) -> list[ChainReport]:
    """Return the verdict on every chain (of one board), by device, stream, and age; then on those that were removed."""
    statement = select(StreamState).order_by(StreamState.device_id, StreamState.stream, StreamState.opened_at)
    if device is not None:
        statement = statement.where(StreamState.device_id == device)
    states = session.scalars(statement).all()
    return [_verify_chain(session, state) for state in states] + _removed(session, states, device)


@contextmanager
def open_copy(path: Path) -> Iterator[Session]:
    """Open a copy of a controller's SQLite database for reading only; the file is not changed.

    Raises:
        NotFoundError: ``audit.database_missing``.
        InvalidError: ``audit.database_unreadable``.
    """
    if not path.is_file():
        raise NotFoundError(
            "audit.database_missing", f"no file {path}", hint="name a copy of the controller's database"
        )
    # Without its write-ahead log a copy is complete and must not get a new one; with it, SQLite has to read that too.
    log = path.with_name(path.name + "-wal")
    mode = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    engine = create_engine(f"sqlite:///file:{quote(str(path.resolve()))}?{mode}&uri=true")
    try:
        with Session(engine) as session:
            yield session
    except DatabaseError as error:
        raise InvalidError(
            "audit.database_unreadable",
            f"{path} is no readable controller database",
            hint="copy it with `sqlite3 controller.db '.backup copy.db'` while the controller runs",
        ) from error
    finally:
        engine.dispose()


def _removed(session: Session, states: Iterable[StreamState], device: str | None) -> list[ChainReport]:
    """Return a fault for each stream whose state is gone, though its rows or the board's report still name it."""
    rows = select(StreamRow.device_id, StreamRow.stream, StreamRow.epoch).distinct()
    newest = select(ReportState.device_id, ReportState.epoch).where(ReportState.epoch != "")
    if device is not None:
        rows = rows.where(StreamRow.device_id == device)
        newest = newest.where(ReportState.device_id == device)
    named = {(name, stream, epoch) for name, stream, epoch in session.execute(rows)}
    named |= {(name, Stream.AUDIT.value, epoch) for name, epoch in session.execute(newest)}
    known = {(state.device_id, state.stream, state.epoch) for state in states}
    fault = Fault(1, "", "the state of the whole stream is missing: nothing tells how many entries it had")
    return [ChainReport(*place, 0, fault) for place in sorted(named - known)]


def _verify_chain(session: Session, state: StreamState) -> ChainReport:
    statement = (
        select(StreamRow)
        .where(StreamRow.device_id == state.device_id, StreamRow.stream == state.stream, StreamRow.epoch == state.epoch)
        .order_by(StreamRow.seq)
        .execution_options(yield_per=ROWS_AT_ONCE)
    )
    with closing(session.scalars(statement)) as stored:
        return _follow(session, state, stored)


def _follow(session: Session, state: StreamState, stored: Iterable[StreamRow]) -> ChainReport:
    chained = state.stream == Stream.AUDIT
    previous = chain.genesis(state.device_id, state.stream, state.epoch)
    last_hash: str | None = None
    last_seq = rows = 0
    for row in stored:
        due = last_seq + 1
        if chained and row.seq != due:
            return _bad(state, rows, due, "", f"entry {due} is missing; {row.seq} stands in its place")
        what = chain.check(
            chain.Entry(row.seq, row.hash, row.header, row.body, row.salt),
            device=state.device_id,
            epoch=state.epoch,
            seq=row.seq,
            previous=previous if chained else None,
        )
        if what is not None:
            return _bad(state, rows, row.seq, row.kind, what)
        facts = header_facts(row.header)
        if (row.kind, row.time_ms) != (facts.kind, facts.time_ms):
            return _bad(state, rows, row.seq, row.kind, "the entry was altered: kind or time are not its header's")
        rows, last_seq, last_hash, previous = rows + 1, row.seq, row.hash, row.hash
        session.expunge(row)
    if last_seq < state.up_to:
        return _bad(state, rows, last_seq + 1, "", f"entries {last_seq + 1} to {state.up_to} are missing")
    if last_seq > state.up_to or last_hash != state.hash:
        return _bad(state, rows, last_seq, "", f"the last receipt covers entry {state.up_to} with another hash")
    if rows + state.dropped != state.up_to:
        return _bad(state, rows, last_seq, "", f"{state.up_to - state.dropped - rows} entries are missing")
    return ChainReport(state.device_id, state.stream, state.epoch, rows, None)


def _bad(state: StreamState, rows: int, seq: int, kind: str, what: str) -> ChainReport:
    return ChainReport(state.device_id, state.stream, state.epoch, rows, Fault(seq, kind, what))
