"""Disk kept for decisions: a file of no content, given up when the disk is full (docs/operations.md, "A full disk")."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from garrison_agent.registry.files import disk_errors, sync_folder

BALLAST_BYTES = 4 * 1024 * 1024
MIN_FREE_BYTES = 1024 * 1024
"""With less than this free the disk counts as full: no transaction needs as much."""
ROOMY_BYTES = 2 * BALLAST_BYTES
"""The ballast is made only where as much again stays free, so that it does not come and go."""

_log = logging.getLogger(__name__)

FreeBytes = Callable[[Path], int]


def free_bytes(folder: Path) -> int:
    """Return how many bytes the file system of ``folder`` has left for this process."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


class Ballast:
    """The file at ``path``. Owner thread only."""

    def __init__(self, path: Path, free: FreeBytes = free_bytes) -> None:
        self.path = path
        self._free = free
        self.held = self._is_whole()

    @property
    def free_bytes(self) -> int:
        """How many bytes are free beside it."""
        return self._free(self.path.parent)

    @property
    def full(self) -> bool:
        """Whether the disk is as good as full."""
        return self.free_bytes < MIN_FREE_BYTES

    @property
    def scarce(self) -> bool:
        """Whether what room there is must be left to decisions."""
        return self.free_bytes < (MIN_FREE_BYTES if self.held else ROOMY_BYTES)

    def make(self) -> bool:
        """Have the file if there is room for it; tell whether it is there."""
        self.held = self._is_whole()
        if self.held or self.free_bytes < ROOMY_BYTES:
            return self.held
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, BALLAST_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:  # a quota, or a file system that cannot: all works without, but for a full disk
            _log.warning("no ballast at %s: %s", self.path, error.strerror)
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.held = self._is_whole()
        return self.held

    def drop(self) -> bool:
        """Give its room back to the file system, at once; tell whether there was any.

        Raises:
            UnavailableError: ``disk.failed``.
        """
        held, self.held = self.held, False
        if held:
            with disk_errors(self.path):
                self.path.unlink(missing_ok=True)
                sync_folder(self.path.parent)  # some file systems free blocks only when the removal is durable
        return held

    def _is_whole(self) -> bool:
        try:
            return self.path.stat().st_size >= BALLAST_BYTES
        except OSError:
            return False
