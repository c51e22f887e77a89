from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from garrison_agent.adapters.ballast import BALLAST_BYTES, MIN_FREE_BYTES, ROOMY_BYTES, Ballast
from garrison_agent.adapters.database import CHECKPOINT_PAGES, SCARCE_CHECKPOINT_PAGES, Database
from garrison_protocol.errors import InsufficientError
from tests.fakes.full_disk import FullDisk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.db"


@pytest.fixture
def disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(path, monkeypatch)


def ballast_of(path: Path) -> Path:
    return path.with_name("agent.db.ballast")


def checkpoint_pages(database: Database) -> int:
    return int(database.connection.execute("PRAGMA wal_autocheckpoint").fetchone()[0])


def test_it_is_private_and_really_takes_its_room(path: Path) -> None:
    Database(path).close()
    status = ballast_of(path).stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (BALLAST_BYTES, 0o600)
    assert status.st_blocks * 512 >= BALLAST_BYTES


def test_it_is_made_only_where_as_much_again_stays_free(path: Path) -> None:
    ballast = Ballast(ballast_of(path), lambda _: ROOMY_BYTES - 1)
    assert not ballast.make()
    assert not ballast.path.exists()
    assert Ballast(ballast_of(path), lambda _: ROOMY_BYTES).make()


def test_one_that_could_not_be_made_whole_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, _offset: int, _length: int) -> None:
        os.truncate(descriptor, 4096)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    ballast = Ballast(ballast_of(path))
    assert not ballast.make()
    assert not ballast.path.exists()
    assert not ballast.scarce  # all works as without one


def test_a_half_made_one_counts_for_nothing_and_is_completed(path: Path) -> None:
    ballast_of(path).write_bytes(b"\0" * 4096)
    ballast = Ballast(ballast_of(path))
    assert not ballast.held
    assert ballast.make()
    assert ballast.path.stat().st_size == BALLAST_BYTES


def test_room_is_scarce_below_a_bound_that_depends_on_it(path: Path) -> None:
    left = ROOMY_BYTES
    ballast = Ballast(ballast_of(path), lambda _: left)
    ballast.make()
    left = MIN_FREE_BYTES
    assert (ballast.full, ballast.scarce) == (False, False)
    left = MIN_FREE_BYTES - 1
    assert (ballast.full, ballast.scarce) == (True, True)
    assert ballast.drop()
    assert not ballast.drop()
    left = ROOMY_BYTES - 1
    assert (ballast.full, ballast.scarce) == (False, True)
    left = ROOMY_BYTES
    assert not ballast.scarce


def test_a_decision_takes_its_room_and_what_can_be_spared_waits(path: Path, disk: FullDisk) -> None:
    database = Database(path, disk.free_bytes)
    assert checkpoint_pages(database) == CHECKPOINT_PAGES
    disk.fill()
    with pytest.raises(InsufficientError, match=r"disk\.full"), database.transaction(spare=True):
        raise AssertionError("it was begun")
    assert ballast_of(path).exists()
    database.put("decision", "1")
    assert not ballast_of(path).exists()
    assert checkpoint_pages(database) == SCARCE_CHECKPOINT_PAGES
    with pytest.raises(InsufficientError, match=r"disk\.full"), database.transaction(spare=True):
        raise AssertionError("it was begun")
    database.put("decision", "2")
    database.restore_ballast()
    assert not ballast_of(path).exists()
    disk.free()
    database.restore_ballast()
    assert ballast_of(path).exists()
    assert checkpoint_pages(database) == CHECKPOINT_PAGES
    with database.transaction(spare=True):
        database.put("sample", "1")
    assert (database.get("decision"), database.get("sample")) == ("2", "1")
    database.close()


def test_a_store_opens_on_a_full_disk(path: Path, disk: FullDisk) -> None:
    Database(path, disk.free_bytes).close()
    disk.fill()
    for number in ("1", "2"):  # the second time without a ballast, in the room that the first one left
        database = Database(path, disk.free_bytes)
        assert not ballast_of(path).exists()
        database.put("started", number)
        database.close()


def test_without_a_ballast_a_full_disk_is_told(path: Path, disk: FullDisk) -> None:
    disk.fill()
    for _ in range(2):  # and the lock is given back
        with pytest.raises(InsufficientError, match=r"disk\.full"):
            Database(path, disk.free_bytes)


def test_where_the_file_system_does_not_tell_the_next_try_finds_room(path: Path, disk: FullDisk) -> None:
    database = Database(path, disk.free_bytes)
    disk.told = False
    disk.fill()
    with pytest.raises(InsufficientError, match=r"disk\.full"), database.transaction(spare=True):
        database.put("sample", "1")
    assert ballast_of(path).exists()
    with pytest.raises(InsufficientError, match=r"disk\.full"):
        database.put("decision", "1")
    database.put("decision", "2")
    assert (database.get("sample"), database.get("decision")) == (None, "2")
    database.close()
