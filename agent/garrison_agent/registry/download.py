"""Resumable, verified downloads of model files, and their repair.

A file is built in ``<digest>.part``, every chunk checked on arrival against the chunk list that the signed manifest
names. There is no separate record of progress: on resume the part itself is hashed, so whatever was interrupted,
and however (SIGKILL, power cut), exactly the chunks that are right count as done. The whole is hashed once more
against the file's SHA-256, synced, and renamed; nothing is installed before. Source: docs/protocol.md, "Blobs".

Everything here blocks and belongs into a thread; ``progress`` and ``cancelled`` are called in that thread, once per
chunk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from garrison_agent.registry.files import BlobStore, disk_errors, sync_folder, write_atomic
from garrison_agent.registry.source import Source
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import InsufficientError, InvalidError, NotFoundError, RefusedError, UnavailableError
from garrison_protocol.manifest import Manifest, ModelFile, Variant, unpack_chunks

MAX_CHUNK_LIST_BYTES = 16 * 1024 * 1024
_SYNC_BYTES = 64 * 1024 * 1024
_SYNC_S = 10.0


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The caller's ``cancelled()`` said so. Verified chunks stay for the next time."""


@dataclass(frozen=True)
class Repair:
    """What a repair did: how many chunks were wrong, and the bytes fetched for them."""

    bad_chunks: int
    fetched_bytes: int


def download_variant(
    manifest: Manifest,
    variant: Variant,
    source: Source,
    blobs: BlobStore,
    *,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> None:
    """Install all files of ``variant``; what is here already is not fetched. ``progress(done, total)`` in bytes.

    Raises:
        Cancelled: on request.
        RefusedError: ``download.digest_mismatch``, ``download.too_long``; nothing is installed.
        UnavailableError: ``download.interrupted``, ``download.busy``, ``source.unreachable``, ``disk.failed``.
        InsufficientError: ``disk.insufficient`` before anything is fetched, ``disk.full`` later.
        NotFoundError: ``source.not_found``.
        InvalidError: ``manifest.chunks_malformed``.
    """
    _require_space(manifest, variant, blobs)
    before = 0
    for file in variant.files:
        if blobs.has(file.sha256, file.size):
            progress(before + file.size, variant.size_bytes)
        else:
            _Build(file, source, blobs, _shifted(progress, before, variant.size_bytes), cancelled).complete()
        before += file.size


def verify_blob(file: ModelFile, blobs: BlobStore, *, cancelled: Callable[[], bool] = lambda: False) -> bool:
    """Tell whether the installed blob has every byte it should have, reading all of it; an unreadable one has not.

    Raises:
        NotFoundError: ``blob.missing``.
        Cancelled: on request.
    """
    descriptor = blobs.open_for_load(file.sha256)
    try:
        return _hash_from(descriptor, 0, hashlib.sha256(), cancelled) == file.sha256
    except OSError:  # a sector that cannot be read is one to fetch again
        return False
    finally:
        os.close(descriptor)


def repair_blob(
    file: ModelFile,
    source: Source,
    blobs: BlobStore,
    *,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Repair:
    """Replace an installed blob by a right copy: good chunks are copied, only wrong ones fetched.

    The copy is a new file, renamed over the old one, so a worker that still maps the old one sees no change.

    Raises:
        As ``download_variant``; a blob that is missing altogether is fetched whole.
    """
    return _repair(_Build(file, source, blobs, _shifted(progress, 0, file.size), cancelled), file, blobs)


def repair_variant(
    manifest: Manifest,
    variant: Variant,
    source: Source,
    blobs: BlobStore,
    *,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Repair:
    """Repair every file of ``variant`` that is missing or wrong. ``progress(done, total)`` in bytes.

    Raises:
        As ``download_variant``.
    """
    bad_chunks = fetched_bytes = before = 0
    for file in variant.files:
        if not (blobs.has(file.sha256, file.size) and verify_blob(file, blobs, cancelled=cancelled)):
            _require_space(manifest, variant, blobs, rebuilt=file)
            report = _shifted(progress, before, variant.size_bytes)
            repair = _repair(_Build(file, source, blobs, report, cancelled), file, blobs)
            bad_chunks += repair.bad_chunks
            fetched_bytes += repair.fetched_bytes
        before += file.size
        progress(before, variant.size_bytes)
    return Repair(bad_chunks, fetched_bytes)


def _repair(build: _Build, file: ModelFile, blobs: BlobStore) -> Repair:
    try:
        installed = blobs.open_for_load(file.sha256)
    except NotFoundError:
        return build.complete()
    try:
        return build.complete(installed)
    finally:
        os.close(installed)


def _shifted(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


class _Build:
    """Builds one file. ``report(done)`` gets the bytes of the file that are right and on the disk."""

    def __init__(
        self,
        file: ModelFile,
        source: Source,
        blobs: BlobStore,
        report: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._file = file
        self._source = source
        self._blobs = blobs
        self._report = report
        self._cancelled = cancelled
        self._path = blobs.part_path(file.sha256)
        self._done = 0
        self._whole = hashlib.sha256()
        self._whole_at = 0  # bytes from the start that _whole has seen
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def complete(self, installed: int | None = None) -> Repair:
        """Bring the part to its end and install it; chunks that are right in ``installed`` are copied from there."""
        digests = self._chunk_list()
        with self._open_part() as part:
            missing = self._missing(part, digests, installed)
            self._report(self._done)
            fetched_bytes = sum(self._length(index) for index in missing)
            for first, last in _runs(missing):
                self._fetch(part, digests, first, last)
            self._install(part)
        return Repair(len(missing), fetched_bytes)

    def _chunk_list(self) -> list[bytes]:
        file = self._file
        size = 32 * -(-file.size // file.chunk_size)
        if size == 0:
            return []
        if size > MAX_CHUNK_LIST_BYTES:
            raise InvalidError(
                "manifest.chunks_malformed",
                f"{file.path}: a chunk list of {size} bytes is too long",
                hint="pack the model again with larger chunks",
            )
        path = self._blobs.chunks_path(file.sha256)
        with contextlib.suppress(OSError):  # missing or unreadable
            data = path.read_bytes()
            if sha256_hex(data) == file.chunks_sha256:
                return unpack_chunks(data, file)
        data = self._fetch_small(file.chunks_sha256, size)
        if sha256_hex(data) != file.chunks_sha256:
            raise _mismatch(file, "its chunk list is not the one that was signed")
        digests = unpack_chunks(data, file)
        write_atomic(path, data)
        return digests

    def _fetch_small(self, sha256: str, size: int) -> bytes:
        data = bytearray()
        with contextlib.closing(self._source.blob(sha256, 0)) as stream:
            for piece in stream:
                data += piece
                if len(data) > size:
                    raise _too_long(self._file, "its chunk list")
                if self._cancelled():
                    raise Cancelled
        if len(data) < size:
            raise _interrupted(self._file, len(data), size)
        return bytes(data)

    @contextlib.contextmanager
    def _open_part(self) -> Iterator[int]:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UnavailableError(
                    "download.busy",
                    f"{self._file.path} is being downloaded already",
                    hint="wait for the other download",
                    retryable=True,
                ) from error
            yield part
        finally:
            os.close(part)

    def _missing(self, part: int, digests: list[bytes], installed: int | None) -> list[int]:
        """Return which chunks must be fetched, after copying from ``installed`` what is right there."""
        missing = []
        buffer = memoryview(bytearray(min(self._file.chunk_size, self._file.size)))
        part_bytes = os.fstat(part).st_size
        for index, digest in enumerate(digests):
            if self._cancelled():
                raise Cancelled
            chunk = buffer[: self._length(index)]
            at = index * self._file.chunk_size
            with disk_errors(self._path):
                right = at + len(chunk) <= part_bytes and _read_right(part, chunk, at, digest)
            if not right and installed is not None:
                with contextlib.suppress(OSError):  # an unreadable sector is a chunk to fetch
                    right = _read_right(installed, chunk, at, digest)
                if right:
                    self._write(part, chunk, at)
            if right:
                self._take(chunk, at)
            else:
                missing.append(index)
        return missing

    def _fetch(self, part: int, digests: list[bytes], first: int, last: int) -> None:
        """Fetch chunks ``first`` to ``last`` in one request, checking and writing each as it comes."""
        file = self._file
        buffer = memoryview(bytearray(min(file.chunk_size, file.size)))
        filled = 0
        index = first
        with contextlib.closing(self._source.blob(file.sha256, first * file.chunk_size)) as stream:
            for piece in stream:
                rest = memoryview(piece)
                while rest and index <= last:
                    length = self._length(index)
                    if filled == 0 and len(rest) >= length:
                        chunk, rest = rest[:length], rest[length:]
                    else:
                        take = min(length - filled, len(rest))
                        buffer[filled : filled + take] = rest[:take]
                        filled, rest = filled + take, rest[take:]
                        if filled < length:
                            break
                        chunk, filled = buffer[:length], 0
                    if hashlib.sha256(chunk).digest() != digests[index]:
                        raise _mismatch(file, f"chunk {index} is not the one that was signed")
                    at = index * file.chunk_size
                    self._write(part, chunk, at)
                    self._take(chunk, at)
                    self._report(self._done)
                    index += 1
                if index > last:
                    if index < len(digests):
                        return  # the chunks that follow are here already
                    if rest:
                        raise _too_long(file, "the file")
                if self._cancelled():
                    raise Cancelled
        if index <= last:
            raise _interrupted(file, min(index * file.chunk_size + filled, file.size), file.size)

    def _install(self, part: int) -> None:
        file = self._file
        with disk_errors(self._path):
            os.ftruncate(part, file.size)
            if _hash_from(part, self._whole_at, self._whole, self._cancelled) != file.sha256:
                os.unlink(self._path)
                raise _mismatch(file, "the whole file is not the one that was signed, though its chunks are")
            os.fsync(part)
            os.replace(self._path, self._blobs.path(file.sha256))
            sync_folder(self._path.parent)

    def _write(self, part: int, chunk: memoryview, at: int) -> None:
        with disk_errors(self._path):
            rest = chunk
            while rest:
                written = os.pwrite(part, rest, at)
                at, rest = at + written, rest[written:]
            self._unsynced += len(chunk)
            if self._unsynced >= _SYNC_BYTES or time.monotonic() - self._synced_at > _SYNC_S:
                os.fdatasync(part)  # bounds what a power cut takes, on fast links and on slow ones
                self._unsynced, self._synced_at = 0, time.monotonic()

    def _take(self, chunk: memoryview, at: int) -> None:
        self._done += len(chunk)
        if at == self._whole_at:
            self._whole.update(chunk)
            self._whole_at += len(chunk)

    def _length(self, index: int) -> int:
        return min(self._file.chunk_size, self._file.size - index * self._file.chunk_size)


def _read_right(descriptor: int, chunk: memoryview, at: int, digest: bytes) -> bool:
    filled = 0
    while filled < len(chunk):
        count = os.preadv(descriptor, [chunk[filled:]], at + filled)
        if count == 0:
            return False
        filled += count
    return hashlib.sha256(chunk).digest() == digest


def _hash_from(descriptor: int, at: int, digest: hashlib._Hash, cancelled: Callable[[], bool]) -> str:
    buffer = memoryview(bytearray(1024 * 1024))
    while count := os.preadv(descriptor, [buffer], at):
        if cancelled():
            raise Cancelled
        digest.update(buffer[:count])
        at += count
    return digest.hexdigest()


def _runs(indexes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of each stretch of consecutive indexes, so that a stretch is one request."""
    first = last = -1
    for index in indexes:
        if first >= 0 and index != last + 1:
            yield first, last
            first = index
        elif first < 0:
            first = index
        last = index
    if first >= 0:
        yield first, last


def _require_space(manifest: Manifest, variant: Variant, blobs: BlobStore, *, rebuilt: ModelFile | None = None) -> None:
    """Refuse before the first byte what cannot fit; the reserve is the budget's business (``budget.plan_space``)."""
    wanted = [rebuilt] if rebuilt else [file for file in variant.files if not blobs.has(file.sha256, file.size)]
    needed = 0
    for file in {file.sha256: file for file in wanted}.values():
        try:
            here = blobs.part_path(file.sha256).stat().st_blocks * 512
        except FileNotFoundError:
            here = 0
        needed += max(0, file.size - here)
    free = blobs.free_bytes()
    if needed > free:
        raise InsufficientError(
            "disk.insufficient",
            f"{manifest.id} needs {needed} more bytes of disk, {free} are free",
            hint="free space, or remove cached models with `garrison-agent cache remove`",
            retryable=True,
            missing_bytes=needed - free,
        )


def _mismatch(file: ModelFile, what: str) -> RefusedError:
    return RefusedError(
        "download.digest_mismatch",
        f"{file.path}: {what}; nothing was installed",
        hint="the controller's copy is damaged or was tampered with: publish the package again",
        sha256=file.sha256,
    )


def _too_long(file: ModelFile, what: str) -> RefusedError:
    return RefusedError(
        "download.too_long",
        f"{file.path}: {what} went on after its signed length; nothing was installed",
        hint="the controller's copy is damaged or was tampered with: publish the package again",
        sha256=file.sha256,
    )


def _interrupted(file: ModelFile, at: int, size: int) -> UnavailableError:
    return UnavailableError(
        "download.interrupted",
        f"{file.path}: the connection ended at byte {at} of {size}",
        hint="the agent continues where it stopped",
        retryable=True,
        sha256=file.sha256,
    )
