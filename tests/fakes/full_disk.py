"""A disk that is full but for what the store's ballast gave up: SQLite fails on it as it does on a real one."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.adapters.ballast import BALLAST_BYTES, ROOMY_BYTES


class FullDisk:
    """Full from ``fill`` to ``free``; without a ballast file to have given up, SQLite finds no room at all."""

    def __init__(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ballast = store.with_name(store.name + ".ballast")
        self._left = ROOMY_BYTES * 2
        self.told = True
        """Whether the file system says how full it is; one with quotas may not."""
        disk = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                needs_room = sql.startswith(("PRAGMA journal_mode", "COMMIT"))
                if needs_room and disk.room() <= 0:
                    if self.in_transaction:
                        super().execute("ROLLBACK")  # as SQLite does when a commit finds no room
                    opening = sql.startswith("PRAGMA")
                    error = sqlite3.OperationalError("disk I/O error" if opening else "database or disk is full")
                    error.sqlite_errorname = "SQLITE_IOERR_SHMSIZE" if opening else "SQLITE_FULL"
                    raise error
                return super().execute(sql, *parameters)

        def connect(path: Path, **options: Any) -> sqlite3.Connection:
            return Connection(path, **options)

        allocate = os.posix_fallocate

        def allocate_here(descriptor: int, offset: int, length: int) -> None:
            if disk._left < length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocate(descriptor, offset, length)

        monkeypatch.setattr("garrison_agent.adapters.database.sqlite3.connect", connect)
        monkeypatch.setattr(os, "posix_fallocate", allocate_here)

    def fill(self) -> None:
        """Let something else take all that is free; the ballast, if it is there, stays."""
        self._left = 0 if self._ballast.exists() else -BALLAST_BYTES

    def free(self) -> None:
        """Let there be room again."""
        self._left = ROOMY_BYTES * 2

    def room(self) -> int:
        """Return how many bytes SQLite could use."""
        return self._left + (0 if self._ballast.exists() else BALLAST_BYTES)

    def free_bytes(self, _folder: Path) -> int:
        """Return what the file system says (``adapters.ballast.FreeBytes``)."""
        return self.room() if self.told else ROOMY_BYTES * 2
