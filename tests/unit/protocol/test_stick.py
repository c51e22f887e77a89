from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from garrison_protocol import bundle
from garrison_protocol.bundle import Kind
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError, InsufficientError, NotFoundError, RefusedError
from garrison_protocol.stick import Stick

DATA = bytes(range(256)) * 10_000
BLOB = bundle.blob_path(sha256_hex(DATA))
STATUS = bundle.home_path("edge-1", Kind.STATUS)


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Stick]:
    with Stick(tmp_path) as stick:
        yield stick


def test_what_is_written_is_read_again(stick: Stick, tmp_path: Path) -> None:
    stick.write(BLOB, (DATA[at : at + 1000] for at in range(0, len(DATA), 1000)))
    assert stick.read(BLOB) == DATA
    assert stick.read_piece(BLOB, 5, 7) == DATA[5:12]
    assert stick.read_piece(BLOB, len(DATA) - 3, 100) == DATA[-3:]
    assert stick.read_piece(BLOB, len(DATA), 100) == b""
    assert stick.size(BLOB) == len(DATA)
    assert stick.same(BLOB, sha256_hex(DATA), len(DATA))
    assert not stick.same(BLOB, "a" * 64, len(DATA))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [sha256_hex(DATA)]


def test_a_write_that_fails_leaves_the_old_file(stick: Stick) -> None:
    stick.write(STATUS, [b"old"])

    def pieces() -> Iterator[bytes]:
        yield b"ne"
        raise InsufficientError("test.full", "full")

    with pytest.raises(InsufficientError):
        stick.write(STATUS, pieces())
    assert stick.read(STATUS) == b"old"
    stick.write(STATUS, [b"new"])
    assert stick.read(STATUS) == b"new"
    assert stick.names("home/edge-1", 10) == ["status.dsse"]


def test_what_is_missing_is_said_to_be(stick: Stick, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as missing:
        stick.read(STATUS)
    assert missing.value.code == "bundle.file_missing"
    assert stick.size(STATUS) is None
    assert stick.names("home", 10) == []
    stick.remove(STATUS)
    with pytest.raises(NotFoundError) as gone:
        Stick(tmp_path / "nowhere")
    assert gone.value.code == "bundle.folder_missing"


def test_long_files_and_folders_are_bounded(stick: Stick, tmp_path: Path) -> None:
    stick.write(STATUS, [b"x"])
    os.truncate(tmp_path / STATUS, 10**9)
    with pytest.raises(RefusedError) as refused:
        stick.read(STATUS)
    assert refused.value.code == "bundle.file_too_long"
    for number in range(20):
        stick.write(bundle.home_path(f"edge-{number}", Kind.STATUS), [b"x"], durable=False)
    assert len(stick.names("home", 5)) == 5


def test_a_link_is_neither_read_nor_written_through(stick: Stick, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("outside")
    (tmp_path / "home" / "edge-1").mkdir(parents=True)
    (tmp_path / STATUS).symlink_to(outside)
    with pytest.raises(RefusedError):
        stick.read(STATUS)
    (tmp_path / (STATUS + ".part")).symlink_to(outside)
    stick.write(STATUS, [b"inside"])
    assert outside.read_text() == "outside"
    assert stick.read(STATUS) == b"inside"


def test_a_full_stick_is_named_so(stick: Stick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(GarrisonError) as refused:
        stick.write("bundle.json", [b"{}"])
    assert refused.value.code == "bundle.no_room"
    assert "FAT32" in refused.value.hint
    assert list(tmp_path.rglob("*.part")) == []


def test_what_a_killed_write_left_goes_with_the_file(stick: Stick, tmp_path: Path) -> None:
    stick.write("bundle.json", [b"{}"])
    (left,) = (path.with_name("bundle.json.part") for path in tmp_path.rglob("bundle.json"))
    left.write_bytes(b"{")
    stick.remove("bundle.json")
    assert not left.exists()
    assert stick.size("bundle.json") is None


def _full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")
