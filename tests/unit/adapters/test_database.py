from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from garrison_agent.adapters.database import MIGRATIONS, Database, translate
from garrison_protocol.errors import ConflictError, GarrisonError, InsufficientError


def test_a_new_store_is_private_durable_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "state" / "agent.db"
    database = Database(path)
    execute = database.connection.execute
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert execute("PRAGMA synchronous").fetchone() == (2,)
    assert execute("PRAGMA foreign_keys").fetchone() == (1,)
    assert execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    tables = {name for (name,) in execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"meta", "slot", "stream", "entry", "high_water", "refusal", "app"}
    database.close()


def test_values_survive_a_restart(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db")
    assert database.get("counter") is None
    database.put("counter", "1")
    database.put("counter", "2")
    database.close()
    database = Database(tmp_path / "agent.db")
    assert database.get("counter") == "2"
    database.close()


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "agent.db")


def test_nested_transactions_are_one(database: Database) -> None:
    def outer() -> None:
        with database.transaction():
            database.put("a", "1")
            with database.transaction():
                database.put("b", "1")
            raise KeyError

    with pytest.raises(KeyError):
        outer()
    assert (database.get("a"), database.get("b")) == (None, None)
    with database.transaction(), database.transaction():
        database.put("a", "2")
    assert database.get("a") == "2"
    database.close()


def test_half_a_decision_is_never_committed(database: Database) -> None:
    def swallow_a_failure() -> None:
        with database.transaction():
            database.put("a", "1")
            try:
                with database.transaction():
                    database.put("b", "1")
                    raise KeyError
            except KeyError:
                pass

    with pytest.raises(RuntimeError, match="nested"):
        swallow_a_failure()
    assert (database.get("a"), database.get("b")) == (None, None)
    database.put("a", "3")  # the next one is not doomed
    assert database.get("a") == "3"
    database.close()


def test_a_full_disk_is_told_and_what_was_recorded_stays(database: Database) -> None:
    database.put("a", "1")
    (pages,) = database.connection.execute("PRAGMA page_count").fetchone()
    database.connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()
    with pytest.raises(InsufficientError, match=r"disk\.full"):
        database.put("b", "x" * 1_000_000)
    assert (database.get("a"), database.get("b")) == ("1", None)
    database.connection.execute("PRAGMA max_page_count = 100000").fetchone()
    database.put("b", "now")
    assert database.get("b") == "now"
    database.close()


def test_our_own_mistakes_stay_what_they_are(database: Database) -> None:
    with pytest.raises(sqlite3.IntegrityError), database.transaction():
        database.connection.execute("INSERT INTO meta VALUES ('a', NULL)")
    database.close()


def test_a_second_agent_is_kept_out_until_the_first_ends(database: Database) -> None:
    with pytest.raises(ConflictError, match=r"database\.in_use"):
        Database(database.path)
    database.put("a", "1")
    database.close()
    second = Database(database.path)
    assert second.get("a") == "1"
    second.close()


def test_a_store_of_a_newer_version_is_left_alone(database: Database) -> None:
    database.connection.execute("PRAGMA user_version = 999")
    database.close()
    for _ in range(2):  # and the lock is given back
        with pytest.raises(ConflictError, match=r"database\.newer"):
            Database(database.path)


def test_a_damaged_store_is_told(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    path.write_bytes(b"this is no database, for sure. " * 100)
    with pytest.raises(GarrisonError, match=r"database\.damaged"):
        Database(path)


def test_a_disk_without_room_for_the_wal_index_is_called_full(tmp_path: Path) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_SHMSIZE"
    assert translate(error, tmp_path / "agent.db").code == "disk.full"
