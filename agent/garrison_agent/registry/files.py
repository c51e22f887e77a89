"""Durable files: atomic writes, and the store of content-addressed blobs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from garrison_protocol.errors import GarrisonError, InsufficientError, InvalidError, NotFoundError, UnavailableError
from garrison_protocol.ids import SHA256_PATTERN

_PART = ".part"
_CHUNKS = ".chunks"


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Put ``data`` at ``path`` so that a power cut leaves either the old file or the new one, whole.

    Raises:
        InsufficientError: ``disk.full``.
        UnavailableError: ``disk.failed``.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translate the ``OSError`` of an operation on ``path``.

    Raises:
        InsufficientError: ``disk.full``.
        UnavailableError: ``disk.failed``, retryable: read-only after errors, I/O error, permissions.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> GarrisonError:
    """Return what ``error``, met while writing ``path``, is called."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InsufficientError(
            "disk.full",
            f"no space left to write {path}: {error.strerror}",
            hint="free space, or remove cached models with `garrison-agent cache remove`",
            retryable=True,
        )
    return UnavailableError(
        "disk.failed",
        f"cannot write {path}: {error.strerror or error}",
        hint="check the disk's health, mount options, and the folder's owner",
        retryable=True,
    )


@dataclass(frozen=True)
class StoredBlob:
    """An installed blob; ``size`` in bytes."""

    sha256: str
    size: int


class BlobStore:
    """Blobs under ``root/sha256/<first two digits>/<digest>``.

    Beside an installed blob lies its chunk list (``.chunks``); ``.part`` is a blob on its way. A blob is only ever
    replaced by a new file, never changed in place, since a worker may have it mapped.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str) -> Path:
        """Return where the blob is, or would be.

        Raises:
            InvalidError: ``blob.bad_digest``; the text is no SHA-256 in hex.
        """
        if re.fullmatch(SHA256_PATTERN, sha256) is None:
            raise InvalidError("blob.bad_digest", f"{sha256!r} is no SHA-256 in lower-case hex")
        return self.root / "sha256" / sha256[:2] / sha256

    def part_path(self, sha256: str) -> Path:
        """Return where a blob is built."""
        return self.path(sha256).with_name(sha256 + _PART)

    def chunks_path(self, sha256: str) -> Path:
        """Return where the chunk list of a blob is kept."""
        return self.path(sha256).with_name(sha256 + _CHUNKS)

    def has(self, sha256: str, size: int) -> bool:
        """Tell whether a blob of this length (bytes) is installed. Its bytes were checked when it was installed."""
        try:
            return self.path(sha256).stat().st_size == size
        except OSError:
            return False

    def open_for_load(self, sha256: str) -> int:
        """Return a read-only descriptor that the caller owns. Whoever loads it hashes it first.

        Raises:
            NotFoundError: ``blob.missing``.
        """
        path = self.path(sha256)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise NotFoundError(
                "blob.missing",
                f"{path} is not on this board, or unreadable: {error.strerror}",
                hint="the agent fetches it again when it repairs the model",
                sha256=sha256,
            ) from error

    def remove(self, sha256: str) -> bool:
        """Delete the blob, its chunk list, and a part of it; tell whether anything was there.

        Raises:
            UnavailableError: ``disk.failed``.
        """
        found = False
        with disk_errors(self.path(sha256)):
            for path in (self.path(sha256), self.part_path(sha256), self.chunks_path(sha256)):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                    found = True
            if found:
                sync_folder(self.path(sha256).parent)
        return found

    def usage(self) -> int:
        """Return how many bytes of disk all files of the store take."""
        return sum(path.stat().st_blocks * 512 for path in self._files())

    def free_bytes(self) -> int:
        """Return how many bytes the file system has left for this process."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def partials(self) -> tuple[str, ...]:
        """Return the digests of blobs whose download has begun; ``remove`` gives up on one."""
        return tuple(sorted(path.name.removesuffix(_PART) for path in self._files() if path.name.endswith(_PART)))

    def list(self) -> tuple[StoredBlob, ...]:
        """Return the installed blobs in order of their digests."""
        whole = [path for path in self._files() if re.fullmatch(SHA256_PATTERN, path.name)]
        return tuple(StoredBlob(path.name, path.stat().st_size) for path in sorted(whole))

    def _files(self) -> Iterator[Path]:
        return self.root.glob("sha256/??/*")
