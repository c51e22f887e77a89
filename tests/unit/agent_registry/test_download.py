"""Downloads in one process; what a SIGKILL does is in test_download_killed.py."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from garrison_agent.registry.download import Cancelled, download_variant, repair_blob, repair_variant, verify_blob
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.source import Source
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import (
    GarrisonError,
    InsufficientError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from tests.fakes.memory_source import MemorySource, RegistryContent
from tests.fakes.packages import Package, make_package, noise

CHUNK = 16 * 1024
DATA = noise(CHUNK * 12 + 1000)
PACKAGE = make_package(files={"model.gguf": DATA}, chunk_size=CHUNK)
FILE = PACKAGE.variant.files[0]


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def source() -> MemorySource:
    return MemorySource(RegistryContent(blobs=dict(PACKAGE.blobs)))


def _never() -> bool:
    return False


def _silent(_done: int, _total: int) -> None:
    """Nobody watches."""


def _download(
    source: Source,
    blobs: BlobStore,
    package: Package = PACKAGE,
    *,
    progress: Callable[[int, int], None] = _silent,
    cancelled: Callable[[], bool] = _never,
) -> None:
    download_variant(package.manifest, package.variant, source, blobs, progress=progress, cancelled=cancelled)


def _refused(source: Source, blobs: BlobStore, kind: type[GarrisonError], package: Package = PACKAGE) -> GarrisonError:
    with pytest.raises(kind) as caught:
        _download(source, blobs, package)
    assert blobs.list() == ()
    return caught.value


@pytest.mark.parametrize("piece_size", [1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 10_000_000])
def test_any_size_of_pieces_gives_the_same_file(blobs: BlobStore, source: MemorySource, piece_size: int) -> None:
    source.piece_size = piece_size
    steps: list[tuple[int, int]] = []
    _download(source, blobs, progress=lambda done, total: steps.append((done, total)))
    assert blobs.path(FILE.sha256).read_bytes() == DATA
    assert blobs.partials() == ()
    assert steps[0] == (0, len(DATA))
    assert steps[-1] == (len(DATA), len(DATA))
    assert steps == sorted(steps)
    assert [line for line in source.log if FILE.sha256 in line] == [f"blob {FILE.sha256} 0"]  # one request


def test_what_is_here_is_not_fetched_again(blobs: BlobStore, source: MemorySource) -> None:
    _download(source, blobs)
    source.log.clear()
    steps: list[tuple[int, int]] = []
    _download(source, blobs, progress=lambda done, total: steps.append((done, total)))
    assert source.log == []
    assert steps == [(len(DATA), len(DATA))]


def test_several_files_empty_and_equal_ones_too(blobs: BlobStore) -> None:
    files = {"a.bin": b"", "b/c.bin": noise(CHUNK, 2), "d.bin": noise(CHUNK, 2), "e.bin": noise(5, 3)}
    package = make_package(files=files, chunk_size=CHUNK)
    steps: list[int] = []
    source = MemorySource(RegistryContent(blobs=package.blobs))
    _download(source, blobs, package, progress=lambda done, _: steps.append(done))
    for file in package.variant.files:
        assert blobs.path(file.sha256).read_bytes() == files[file.path]
    assert steps == sorted(steps)
    assert steps[-1] == package.variant.size_bytes
    assert source.sent[sha256_hex(noise(CHUNK, 2))] == CHUNK


@pytest.mark.parametrize("after", [0, 1, CHUNK, CHUNK * 5 + 7, len(DATA) - 1])
def test_a_cut_connection_continues_behind_the_last_whole_chunk(
    blobs: BlobStore, source: MemorySource, after: int
) -> None:
    _download_chunk_list(blobs, source)
    source.cut_blob_after = after
    error = _refused(source, blobs, UnavailableError)
    assert error.code == "download.interrupted"
    assert error.retryable
    source.sent.clear()
    _download(source, blobs)
    assert blobs.path(FILE.sha256).read_bytes() == DATA
    assert source.sent[FILE.sha256] == len(DATA) - after // CHUNK * CHUNK


def test_a_broken_connection_keeps_the_sources_code(blobs: BlobStore, source: MemorySource) -> None:
    _download_chunk_list(blobs, source)
    source.fail_blob_after = CHUNK * 3
    assert _refused(source, blobs, UnavailableError).code == "source.unreachable"
    _download(source, blobs)
    assert blobs.path(FILE.sha256).read_bytes() == DATA


def test_cancelling_keeps_what_was_verified(blobs: BlobStore, source: MemorySource) -> None:
    done = [0]

    def progress(now: int, _total: int) -> None:
        done[0] = now

    with pytest.raises(Cancelled):
        _download(source, blobs, progress=progress, cancelled=lambda: done[0] >= CHUNK * 4)
    assert blobs.partials() == (FILE.sha256,)
    kept = done[0]
    source.log.clear()
    _download(source, blobs)
    assert source.log == [f"blob {FILE.sha256} {kept}"]


def test_a_wrong_byte_installs_nothing_and_costs_one_chunk(blobs: BlobStore, source: MemorySource) -> None:
    wrong = bytearray(DATA)
    wrong[CHUNK * 5 + 3] ^= 1
    source.content.blobs[FILE.sha256] = bytes(wrong)
    error = _refused(source, blobs, RefusedError)
    assert error.code == "download.digest_mismatch"
    assert "chunk 5" in error.message
    source.content.blobs[FILE.sha256] = DATA
    source.log.clear()
    _download(source, blobs)
    assert source.log == [f"blob {FILE.sha256} {CHUNK * 5}"]


def test_a_damaged_part_is_fetched_again_only_where_it_is_wrong(blobs: BlobStore, source: MemorySource) -> None:
    _download_chunk_list(blobs, source)
    source.cut_blob_after = CHUNK * 8
    _refused(source, blobs, UnavailableError)
    with blobs.part_path(FILE.sha256).open("r+b") as part:  # as a power cut leaves it: zeros where nothing arrived
        part.seek(CHUNK * 2)
        part.write(bytes(CHUNK))
    source.log.clear()
    _download(source, blobs)
    assert blobs.path(FILE.sha256).read_bytes() == DATA
    assert source.log == [f"blob {FILE.sha256} {CHUNK * 2}", f"blob {FILE.sha256} {CHUNK * 8}"]


def test_a_part_that_is_too_long_is_cut(blobs: BlobStore, source: MemorySource) -> None:
    blobs.part_path(FILE.sha256).parent.mkdir(parents=True)
    blobs.part_path(FILE.sha256).write_bytes(DATA + b"more")
    _download(source, blobs)
    assert blobs.path(FILE.sha256).read_bytes() == DATA
    assert FILE.sha256 not in source.sent


def test_an_endless_file_is_refused(blobs: BlobStore, source: MemorySource) -> None:
    _download_chunk_list(blobs, source)
    source.endless.add(FILE.sha256)
    assert _refused(source, blobs, RefusedError).code == "download.too_long"
    assert source.sent[FILE.sha256] <= len(DATA) + source.piece_size


def test_an_endless_chunk_list_is_refused(blobs: BlobStore, source: MemorySource) -> None:
    source.endless.add(FILE.chunks_sha256)
    assert _refused(source, blobs, RefusedError).code == "download.too_long"


def test_a_wrong_chunk_list_is_refused(blobs: BlobStore, source: MemorySource) -> None:
    source.content.blobs[FILE.chunks_sha256] = bytes(len(PACKAGE.blobs[FILE.chunks_sha256]))
    assert _refused(source, blobs, RefusedError).code == "download.digest_mismatch"
    assert not blobs.chunks_path(FILE.sha256).exists()


def test_a_kept_chunk_list_that_was_damaged_is_fetched_again(blobs: BlobStore, source: MemorySource) -> None:
    _download_chunk_list(blobs, source)
    blobs.chunks_path(FILE.sha256).write_bytes(b"\0" * 40)
    _download(source, blobs)
    assert blobs.path(FILE.sha256).read_bytes() == DATA


def test_a_missing_blob_is_said_to_be_missing(blobs: BlobStore, source: MemorySource) -> None:
    del source.content.blobs[FILE.sha256]
    assert _refused(source, blobs, NotFoundError).code == "source.not_found"


def test_a_manifest_whose_chunks_are_of_another_file_installs_nothing(blobs: BlobStore) -> None:
    other = make_package(files={"model.gguf": noise(len(DATA), 9)}, chunk_size=CHUNK).variant.files[0]
    lying = FILE.model_copy(update={"chunks_sha256": other.chunks_sha256})
    content = RegistryContent(blobs=dict(PACKAGE.blobs))
    content.blobs |= make_package(files={"model.gguf": noise(len(DATA), 9)}, chunk_size=CHUNK).blobs
    content.blobs[FILE.sha256] = noise(len(DATA), 9)
    package = _with_file(lying)
    error = _refused(MemorySource(content), blobs, RefusedError, package)
    assert error.code == "download.digest_mismatch"
    assert blobs.partials() == ()


def test_an_absurd_chunk_list_is_refused_before_it_is_fetched(blobs: BlobStore, source: MemorySource) -> None:
    huge = FILE.model_copy(update={"size": 1 << 40, "chunk_size": 4096})
    with pytest.raises(InvalidError, match=r"manifest\.chunks_malformed"):
        repair_blob(huge, source, blobs, progress=_silent, cancelled=_never)
    assert source.log == []


def test_too_little_disk_is_noticed_before_the_download(
    blobs: BlobStore, source: MemorySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "free_bytes", lambda: len(DATA) - 100)
    error = _refused(source, blobs, InsufficientError)
    assert error.code == "disk.insufficient"
    assert error.fields["missing_bytes"] == 100
    assert source.log == []


def test_a_disk_that_fills_up_on_the_way_keeps_what_it_has(
    blobs: BlobStore, source: MemorySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset >= CHUNK * 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert _refused(source, blobs, InsufficientError).code == "disk.full"
    source.log.clear()
    _download(source, blobs)
    assert source.log == [f"blob {FILE.sha256} {CHUNK * 6}"]


def test_a_short_write_is_continued(blobs: BlobStore, source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:5000], offset))
    _download(source, blobs)
    assert blobs.path(FILE.sha256).read_bytes() == DATA


def test_two_downloads_of_one_file_do_not_mix(blobs: BlobStore, source: MemorySource) -> None:
    codes: list[str] = []

    def second(done: int, _total: int) -> None:
        if done == CHUNK * 3:
            with pytest.raises(UnavailableError) as caught:
                _download(MemorySource(source.content), blobs)
            codes.append(caught.value.code)

    _download(source, blobs, progress=second)
    assert codes == ["download.busy"]
    assert blobs.path(FILE.sha256).read_bytes() == DATA


def test_verify_reads_every_byte(blobs: BlobStore, source: MemorySource) -> None:
    with pytest.raises(NotFoundError):
        verify_blob(FILE, blobs)
    _download(source, blobs)
    assert verify_blob(FILE, blobs)
    _flip(blobs.path(FILE.sha256), len(DATA) - 1)
    assert not verify_blob(FILE, blobs)


def test_repair_fetches_only_wrong_chunks_into_a_new_file(blobs: BlobStore, source: MemorySource) -> None:
    _download(source, blobs)
    path = blobs.path(FILE.sha256)
    for at in (CHUNK * 2 + 5, CHUNK * 3, len(DATA) - 1):
        _flip(path, at)
    damaged = path.read_bytes()
    source.log.clear()
    with path.open("rb") as mapped:  # a worker still has it
        repair = repair_blob(FILE, source, blobs, progress=_silent, cancelled=_never)
        assert mapped.read() == damaged
    assert path.read_bytes() == DATA
    assert repair.bad_chunks == 3
    assert repair.fetched_bytes == 2 * CHUNK + 1000
    assert source.log == [f"blob {FILE.sha256} {CHUNK * 2}", f"blob {FILE.sha256} {CHUNK * 12}"]


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_repair_of_a_file_of_wrong_length(blobs: BlobStore, source: MemorySource, damage: str) -> None:
    _download(source, blobs)
    path = blobs.path(FILE.sha256)
    match damage:
        case "shorter":
            os.truncate(path, CHUNK * 4 + 1)
        case "longer":
            path.write_bytes(DATA + b"tail")
        case "gone":
            path.unlink()
    source.sent.clear()
    repair_variant(PACKAGE.manifest, PACKAGE.variant, source, blobs, progress=_silent, cancelled=_never)
    assert path.read_bytes() == DATA
    expected = {"shorter": len(DATA) - CHUNK * 4, "longer": 0, "gone": len(DATA)}
    assert source.sent.get(FILE.sha256, 0) == expected[damage]


def test_an_unreadable_sector_is_fetched_again(
    blobs: BlobStore, source: MemorySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    _download(source, blobs)
    bad, read = blobs.path(FILE.sha256).stat().st_ino, os.preadv

    def failing(descriptor: int, buffers: list[memoryview], at: int) -> int:
        if os.fstat(descriptor).st_ino == bad and at < 2 * CHUNK and at + len(buffers[0]) > CHUNK:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    assert not verify_blob(FILE, blobs)
    repair = repair_variant(PACKAGE.manifest, PACKAGE.variant, source, blobs, progress=_silent, cancelled=_never)
    assert repair.bad_chunks == 1
    assert verify_blob(FILE, blobs)


def test_what_cannot_even_be_opened_is_fetched_whole(blobs: BlobStore, source: MemorySource) -> None:
    _download(source, blobs)
    blobs.path(FILE.sha256).unlink()
    blobs.path(FILE.sha256).symlink_to(blobs.path(FILE.sha256))
    assert not blobs.has(FILE.sha256, FILE.size)
    with pytest.raises(NotFoundError, match=r"blob\.missing"):
        verify_blob(FILE, blobs)
    repair_variant(PACKAGE.manifest, PACKAGE.variant, source, blobs, progress=_silent, cancelled=_never)
    assert blobs.path(FILE.sha256).read_bytes() == DATA


def test_repair_without_a_network_changes_nothing_and_continues_later(blobs: BlobStore, source: MemorySource) -> None:
    _download(source, blobs)
    path = blobs.path(FILE.sha256)
    _flip(path, 5)
    damaged = path.read_bytes()
    source.unreachable = True
    with pytest.raises(UnavailableError):
        repair_blob(FILE, source, blobs, progress=_silent, cancelled=_never)
    assert path.read_bytes() == damaged
    source.unreachable = False
    source.sent.clear()
    repair_blob(FILE, source, blobs, progress=_silent, cancelled=_never)
    assert path.read_bytes() == DATA


def test_repair_of_a_variant_leaves_good_files_alone(blobs: BlobStore) -> None:
    package = make_package(files={"a": noise(CHUNK * 2, 5), "b": noise(CHUNK * 2, 6)}, chunk_size=CHUNK)
    source = MemorySource(RegistryContent(blobs=package.blobs))
    _download(source, blobs, package)
    good, bad = (blobs.path(file.sha256) for file in package.variant.files)
    _flip(bad, 0)
    inodes = good.stat().st_ino, bad.stat().st_ino
    steps: list[tuple[int, int]] = []
    repair = repair_variant(
        package.manifest,
        package.variant,
        source,
        blobs,
        progress=lambda done, total: steps.append((done, total)),
        cancelled=_never,
    )
    assert repair.bad_chunks == 1
    assert good.stat().st_ino == inodes[0]
    assert bad.stat().st_ino != inodes[1]
    assert steps[-1] == (CHUNK * 4, CHUNK * 4)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def _download_chunk_list(blobs: BlobStore, source: MemorySource) -> None:
    """Bring only the chunk list, so that a fault meant for the file does not hit it."""
    data = source.content.blobs.pop(FILE.sha256)
    with pytest.raises(NotFoundError):
        _download(source, blobs)
    source.content.blobs[FILE.sha256] = data
    source.log.clear()


def _with_file(file: object) -> Package:
    variant = PACKAGE.variant.model_copy(update={"files": (file,)})
    return Package(PACKAGE.manifest.model_copy(update={"variants": (variant,)}), PACKAGE.blobs)
