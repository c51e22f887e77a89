from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from garrison_agent.registry.files import BlobStore, StoredBlob, write_atomic
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import InsufficientError, InvalidError, NotFoundError, UnavailableError

SHA = sha256_hex(b"blob")


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def _install(blobs: BlobStore, data: bytes) -> str:
    sha256 = sha256_hex(data)
    write_atomic(blobs.path(sha256), data)
    return sha256


def test_write_replaces_the_file_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"one")
    with path.open("rb") as before:
        write_atomic(path, b"two", mode=0o600)
        assert before.read() == b"one"
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, InsufficientError, "disk.full"),
        (errno.EDQUOT, InsufficientError, "disk.full"),
        (errno.EROFS, UnavailableError, "disk.failed"),
        (errno.EIO, UnavailableError, "disk.failed"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], code: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"one")

    def fail(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=code):
        write_atomic(path, b"two")
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_store_lists_what_is_installed_and_what_is_on_its_way(blobs: BlobStore) -> None:
    assert blobs.list() == ()
    assert blobs.usage() == 0
    assert not blobs.has(SHA, 4)
    sha256 = _install(blobs, b"blob")
    other = sha256_hex(b"other")
    write_atomic(blobs.part_path(other), b"oth")
    write_atomic(blobs.chunks_path(sha256), b"c" * 32)
    assert blobs.list() == (StoredBlob(sha256, 4),)
    assert blobs.partials() == (other,)
    assert blobs.has(sha256, 4)
    assert not blobs.has(sha256, 5)
    assert blobs.usage() >= 4096


def test_remove_takes_everything_about_a_blob(blobs: BlobStore) -> None:
    sha256 = _install(blobs, b"blob")
    write_atomic(blobs.part_path(sha256), b"bl")
    write_atomic(blobs.chunks_path(sha256), b"c" * 32)
    assert blobs.remove(sha256)
    assert blobs.list() == ()
    assert blobs.partials() == ()
    assert not blobs.chunks_path(sha256).exists()
    assert not blobs.remove(sha256)


def test_open_for_load_reads_and_cannot_write(blobs: BlobStore) -> None:
    descriptor = blobs.open_for_load(_install(blobs, b"blob"))
    try:
        assert os.read(descriptor, 10) == b"blob"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")
    finally:
        os.close(descriptor)
    with pytest.raises(NotFoundError, match=r"blob\.missing"):
        blobs.open_for_load("0" * 64)


@pytest.mark.parametrize("text", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_digests_name_blobs(blobs: BlobStore, text: str) -> None:
    with pytest.raises(InvalidError, match=r"blob\.bad_digest"):
        blobs.path(text)
