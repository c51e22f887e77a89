from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.pool import QueuePool

from garrison_controller.access.tables import AdminEvent, Grant
from garrison_controller.db.base import Database
from garrison_protocol.errors import UnavailableError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.create_all()
    yield database
    database.close()


def event(number: int, at: datetime = NOW) -> AdminEvent:
    return AdminEvent(at=at, principal="alice", action="test", subject=str(number), outcome="done", detail={})


def subjects(database: Database) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(AdminEvent.subject).order_by(AdminEvent.id)))


def test_a_session_is_one_transaction(database: Database) -> None:
    with database.session() as session:
        session.add(event(1))

    def fail() -> None:
        with database.session() as session:
            session.add(event(2))
            session.flush()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert subjects(database) == ["1"]


def test_a_reading_session_keeps_nothing(database: Database) -> None:
    with database.reading() as session:
        session.add(event(1))
        session.flush()
    assert subjects(database) == []


def test_a_reader_sees_the_last_commit_while_a_writer_works(database: Database) -> None:
    with database.session() as session:
        session.add(event(1))
        session.flush()
        seen: list[list[str]] = []
        reader = threading.Thread(target=lambda: seen.append(subjects(database)))
        reader.start()
        reader.join(10)
        assert seen == [[]]


def test_writers_that_read_first_take_turns(database: Database) -> None:
    with database.session() as session:
        session.add(event(0))

    def add() -> None:
        for _ in range(20):
            with database.session() as session:
                last = session.scalars(select(AdminEvent).order_by(AdminEvent.id.desc()).limit(1)).one()
                session.add(event(int(last.subject) + 1))

    writers = [threading.Thread(target=add) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert subjects(database) == [str(number) for number in range(81)]


def test_times_are_aware_utc(database: Database) -> None:
    elsewhere = timezone(timedelta(hours=5))
    with database.session() as session:
        session.add(event(1, NOW.astimezone(elsewhere)))
    with database.reading() as session:
        found = session.scalars(select(AdminEvent.at)).one()
        assert found == NOW
        assert found.utcoffset() == timedelta(0)
    with pytest.raises(StatementError, match="naive"), database.session() as session:
        session.add(event(2, NOW.replace(tzinfo=None)))


def test_foreign_keys_hold(database: Database) -> None:
    orphan = Grant(id="x", principal_id="nobody", role="viewer", scope="/", granted_by="console", granted_at=NOW)
    with pytest.raises(IntegrityError, match="FOREIGN KEY"), database.session() as session:
        session.add(orphan)


def test_commits_survive_power_loss_as_far_as_sqlite_can(database: Database) -> None:
    with database.reading() as session:
        pragmas = {
            name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_caller_that_gets_no_connection_is_told_to_try_again(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.create_all()
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    pool._timeout = 0.01
    held = [database.engine.connect() for _ in range(pool.size() + pool._max_overflow)]
    for transaction in (database.session, database.reading):
        with pytest.raises(UnavailableError) as busy, transaction() as session:
            session.execute(select(1))
        assert (busy.value.code, busy.value.retryable) == ("database.busy", True)
    for connection in held:
        connection.close()
    assert subjects(database) == []
    database.close()
