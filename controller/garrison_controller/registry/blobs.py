"""Content-addressed files of published models on the controller's disk, received piece by piece.

An unfinished upload is a ``.part`` file that the next call continues. A blob gets its name only when all of its bytes
have been hashed; then it never changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import shutil
from pathlib import Path

from garrison_controller.signing.metadata import sync_folder
from garrison_protocol.errors import ConflictError, InsufficientError, InvalidError, RefusedError
from garrison_protocol.ids import SHA256_PATTERN
from garrison_protocol.manifest import MAX_FILE_BYTES

DISK_RESERVE_BYTES = 64 * 1024 * 1024
"""Kept free for the database."""


class BlobFolder:
    """``sha256/<first two digits>/<digest>``. Thread-safe; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "sha256"

    def path(self, sha256: str) -> Path:
        """Return where the blob lies or will lie.

        Raises:
            InvalidError: ``blob.name_malformed``.
        """
        if re.fullmatch(SHA256_PATTERN, sha256) is None:
            raise InvalidError("blob.name_malformed", "a blob's name is its SHA-256: 64 lower-case hex digits")
        return self._folder / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """Return the size of a complete blob, or None."""
        return _size(self.path(sha256))

    def received(self, sha256: str) -> int | None:
        """Return how many bytes of an unfinished upload are kept, or None if there is none."""
        return _size(_part(self.path(sha256)))

    def begin(self, sha256: str, offset: int, total: int) -> IncomingBlob:
        """Open an upload of ``total`` bytes from ``offset`` on; offset 0 starts afresh.

        Raises:
            InvalidError: ``blob.name_malformed``, ``blob.range_malformed``.
            ConflictError: ``blob.offset_mismatch`` (field ``offset`` says where to continue),
                ``blob.upload_in_progress``.
            InsufficientError: ``disk.insufficient``.
        """
        path = self.path(sha256)
        if not 0 <= offset <= total <= MAX_FILE_BYTES:
            raise InvalidError("blob.range_malformed", f"bytes from {offset} of {total}")
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free - (total - offset) < DISK_RESERVE_BYTES:
            raise InsufficientError(
                "disk.insufficient",
                f"{total - offset} bytes do not fit on the controller's disk ({free} free)",
                hint="free space in the controller's state folder",
                free=free,
                needed=total - offset,
            )
        descriptor = os.open(_part(path), os.O_RDWR | os.O_CREAT, 0o640)
        file = io.FileIO(descriptor, "r+b")
        try:
            _lock(file, sha256)
            if not _is_at(descriptor, _part(path)):
                # Its last upload ended between our opening and locking it: this may be the finished blob by now.
                raise _in_progress(sha256)
            kept = os.fstat(descriptor).st_size
            if offset not in (0, kept):
                raise ConflictError(
                    "blob.offset_mismatch",
                    f"{kept} bytes of {sha256} are here, the upload continues at {offset}",
                    hint="continue at the offset that HEAD answers",
                    offset=kept,
                )
            file.truncate(offset)
            file.seek(offset)
        except BaseException:
            file.close()
            raise
        return IncomingBlob(file, path, sha256, offset, total)


class IncomingBlob:
    """One upload. Calls may come from several threads, one after the other; always ``close`` it."""

    def __init__(self, file: io.FileIO, path: Path, sha256: str, offset: int, total: int) -> None:
        self._file = file
        self._path = path
        self._sha256 = sha256
        self._total = total
        self.offset = offset

    def write(self, data: bytes) -> None:
        """Append ``data``.

        Raises:
            InvalidError: ``blob.too_long``.
        """
        if self.offset + len(data) > self._total:
            raise InvalidError("blob.too_long", f"more than the announced {self._total} bytes came for {self._sha256}")
        view = memoryview(data)
        while view:
            written = self._file.write(view)
            self.offset += written
            view = view[written:]

    def finish(self) -> bool:
        """Make what came durable; True if the blob is complete now and has its name.

        Raises:
            RefusedError: ``blob.digest_mismatch``; the bytes are thrown away.
        """
        os.fsync(self._file.fileno())
        if self.offset < self._total:
            return False
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        part = _part(self._path)
        if digest != self._sha256:
            part.unlink()
            raise RefusedError(
                "blob.digest_mismatch",
                f"the {self._total} bytes uploaded as {self._sha256} have the SHA-256 {digest}",
                hint="check the package with `garrison model add`, then upload again",
                sha256=self._sha256,
                received=digest,
            )
        part.replace(self._path)
        sync_folder(self._path.parent)
        return True

    def close(self) -> None:
        """Release the upload; unfinished bytes stay for the next one."""
        self._file.close()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether the open file is the one that ``path`` names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: io.FileIO, sha256: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_progress(sha256) from error


def _in_progress(sha256: str) -> ConflictError:
    return ConflictError(
        "blob.upload_in_progress", f"{sha256} is being uploaded already", hint="wait for it", retryable=True
    )
