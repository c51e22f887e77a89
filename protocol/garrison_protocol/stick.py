"""The folder of a bundle on a medium that somebody else has had in hands: reads and writes that it cannot turn astray.

Every path is walked part by part from the opened folder, no symbolic link is followed, only regular files are opened,
and no read goes on for longer than its bound. Writes become visible whole and durable. Blocking; one thread at a time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

from garrison_protocol import bundle
from garrison_protocol.errors import GarrisonError, InsufficientError, NotFoundError, RefusedError, UnavailableError

PIECE_BYTES = 1024 * 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_UNFINISHED = ".part"


class Stick:
    """An opened bundle folder. Every method takes paths that ``bundle.parse`` knows, and raises GarrisonError.

    NotFoundError: ``bundle.file_missing``.
    RefusedError: ``bundle.not_a_file`` (a link, a device, a folder in a file's place), ``bundle.file_too_long``.
    UnavailableError: ``bundle.unreadable``, retryable; the medium fails, or is gone.
    """

    def __init__(self, root: Path) -> None:
        """Open ``root``, a folder.

        Raises:
            NotFoundError: ``bundle.folder_missing``.
        """
        self.root = root
        try:
            # The folder itself may be named through a link: whoever runs the command chose it.
            self._folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(
                "bundle.folder_missing",
                f"{root} is no folder that can be opened: {error.strerror}",
                hint="mount the stick, and name the folder that holds the bundle",
            ) from error

    def __enter__(self) -> Stick:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._folder)

    def read(self, path: str) -> bytes:
        """Return the whole file."""
        limit = bundle.parse(path).max_bytes
        with self._open(path) as file:
            if os.fstat(file).st_size > limit:
                raise _too_long(path, limit)
            return self._take(path, file, 0, limit + 1, limit)

    def read_piece(self, path: str, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on; fewer only at the end of the file."""
        limit = bundle.parse(path).max_bytes
        with self._open(path) as file:
            return self._take(path, file, offset, min(length, max(0, limit + 1 - offset)), limit)

    def size(self, path: str) -> int | None:
        """Return the file's size in bytes; None if it is missing."""
        bundle.parse(path)
        try:
            with self._open(path) as file:
                return os.fstat(file).st_size
        except NotFoundError:
            return None

    def names(self, folder: str, limit: int) -> list[str]:
        """Return what lies in ``folder``, at most ``limit`` names, in order; nothing if there is no such folder."""
        try:
            with self._walk(folder.split("/"), create=False) as descriptor, os.scandir(descriptor) as entries:
                return sorted(entry.name for entry, _ in zip(entries, range(limit), strict=False))
        except NotFoundError:
            return []
        except OSError as error:
            raise _unreadable(folder, error) from error

    def same(self, path: str, sha256: str, size: int, progress: Callable[[int], None] = lambda _done: None) -> bool:
        """Tell whether the file has this size and digest, reading all of it; an unreadable one has not."""
        if self.size(path) != size:
            return False
        digest, at = hashlib.sha256(), 0
        with contextlib.suppress(UnavailableError), self._open(path) as file:
            while piece := self._take(path, file, at, PIECE_BYTES, size):
                digest.update(piece)
                at += len(piece)
                progress(at)
        return digest.hexdigest() == sha256

    def write(self, path: str, pieces: Iterable[bytes], *, durable: bool = True) -> None:
        """Put ``pieces`` at ``path``: seen only when whole, and durable on return. What was there is replaced.

        Of many small files, write each with ``durable`` off, then call ``sync``: a stick takes its time for each. One
        that is pulled before may hold them empty.

        Raises:
            InsufficientError: ``bundle.no_room``.
            UnavailableError: ``bundle.unwritable``.
        """
        bundle.parse(path)
        *folders, name = path.split("/")
        try:
            with self._walk(folders, create=True) as folder:
                unfinished = name + _UNFINISHED
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(unfinished, dir_fd=folder)
                file = os.open(unfinished, _NEW, 0o644, dir_fd=folder)
                try:
                    with os.fdopen(file, "wb") as stream:
                        for piece in pieces:
                            stream.write(piece)
                        stream.flush()
                        if durable:
                            os.fsync(file)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(unfinished, dir_fd=folder)  # half a model would keep a full stick full
                    raise
                os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
                if durable:
                    os.fsync(folder)
        except OSError as error:
            raise _unwritable(path, error) from error

    def remove(self, path: str) -> None:
        """Take the file away, and what a write that was cut off left of it; a link is removed, not followed.

        Raises:
            UnavailableError: ``bundle.unwritable``.
        """
        bundle.parse(path)
        *folders, name = path.split("/")
        try:
            with self._walk(folders, create=False) as folder:
                for one in (name + _UNFINISHED, name):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(one, dir_fd=folder)
                os.fsync(folder)
        except NotFoundError:
            return
        except OSError as error:
            raise _unwritable(path, error) from error

    def sync(self) -> None:
        """Make everything written so far durable."""
        os.sync()

    def free_bytes(self) -> int:
        """Return how many bytes the medium has left."""
        status = os.fstatvfs(self._folder)
        return status.f_bavail * status.f_frsize

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[int]:
        *folders, name = path.split("/")
        with self._walk(folders, create=False) as folder:
            try:
                file = os.open(name, _FILE, dir_fd=folder)
            except OSError as error:
                raise _read_error(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise _not_a_file(path)
            yield file
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _walk(self, folders: list[str], *, create: bool) -> Iterator[int]:
        """Give the descriptor of the last of ``folders``, each opened in the one before."""
        current = os.dup(self._folder)
        try:
            for name in folders:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o755, dir_fd=current)
                        os.fsync(current)
                try:
                    following = os.open(name, _FOLDER, dir_fd=current)
                except OSError as error:
                    raise _read_error(name, error) from error
                os.close(current)
                current = following
            yield current
        finally:
            os.close(current)

    def _take(self, path: str, file: int, offset: int, length: int, limit: int) -> bytes:
        parts, at, end = [], offset, offset + length
        try:
            while at < end and (piece := os.pread(file, min(PIECE_BYTES, end - at), at)):
                parts.append(piece)
                at += len(piece)
        except OSError as error:
            raise _unreadable(path, error) from error
        if at > limit:
            raise _too_long(path, limit)
        return b"".join(parts)


def _read_error(path: str, error: OSError) -> GarrisonError:
    if error.errno == errno.ENOENT:
        return NotFoundError("bundle.file_missing", f"the bundle has no {path}", hint="export it again, completely")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR):
        return _not_a_file(path)
    return _unreadable(path, error)


def _not_a_file(path: str) -> RefusedError:
    return RefusedError(
        "bundle.not_a_file",
        f"{path} on the stick is a link, a device, or a folder in the place of a file",
        hint="nobody exports such things: find out who had the stick",
    )


def _too_long(path: str, limit: int) -> RefusedError:
    return RefusedError(
        "bundle.file_too_long",
        f"{path} on the stick is longer than the {limit} bytes that it may have",
        hint="nobody exports such things: find out who had the stick",
    )


def _unreadable(path: str, error: OSError) -> UnavailableError:
    return UnavailableError(
        "bundle.unreadable",
        f"{path} on the stick cannot be read: {error.strerror or error}",
        hint="check that the stick is mounted and that you may read it",
        retryable=True,
    )


def _unwritable(path: str, error: OSError) -> GarrisonError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InsufficientError(
            "bundle.no_room",
            f"{path} does not fit on the stick: {error.strerror}",
            hint="take a larger one; FAT32 holds no file of 4 GiB or more: use exFAT or ext4",
        )
    return UnavailableError(
        "bundle.unwritable",
        f"{path} cannot be written to the stick: {error.strerror or error}",
        hint="check that the stick is mounted, writable, and whole",
        retryable=True,
    )
