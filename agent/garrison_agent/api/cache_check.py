"""A check of installed files under way: written by the thread that reads the disk, looked at by the API."""

from __future__ import annotations

import secrets
import threading
from typing import Literal, TypedDict

FileOutcome = Literal["ok", "damaged", "missing", "repaired"]


class FileCheck(TypedDict):
    """One file of a package. ``detail`` says what is wrong with it, or why it could not be repaired."""

    package: str
    variant: str
    path: str
    size_bytes: int
    outcome: FileOutcome
    detail: str


class CacheCheckView(TypedDict):
    """How far a check is; ``files`` holds those that were judged."""

    id: str
    state: Literal["reading", "repairing", "done", "cancelled"]
    path: str
    """What is being read or fetched now."""
    done_bytes: int
    total_bytes: int
    files: list[FileCheck]


class CacheCheck:
    """Safe in any thread."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._view = CacheCheckView(id=self.id, state="reading", path="", done_bytes=0, total_bytes=0, files=[])

    @property
    def view(self) -> CacheCheckView:
        """How far it is."""
        with self._lock:
            return CacheCheckView(**{**self._view, "files": list(self._view["files"])})

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self.view["state"] in ("done", "cancelled")

    def cancel(self) -> None:
        """Let it end soon."""
        self._stop.set()

    def cancelled(self) -> bool:
        """Tell whether it is to end."""
        return self._stop.is_set()

    def at(self, state: Literal["reading", "repairing"], path: str, done: int, total: int) -> None:
        """Note what is being done, and how much of it is."""
        with self._lock:
            self._view.update({"state": state, "path": path, "done_bytes": done, "total_bytes": total})

    def judged(self, files: list[FileCheck]) -> None:
        """Note the files that were judged, all of them."""
        with self._lock:
            self._view["files"] = list(files)

    def end(self) -> None:
        """Note that nothing follows."""
        with self._lock:
            self._view["state"] = "cancelled" if self._stop.is_set() else "done"
