"""What a board keeps of the registry's metadata on its disk, so that it can verify without a network.

``trusted.json`` holds timestamp, snapshot, targets, and the families asked for of one verified state in a single file,
so that a power cut leaves one whole state. ``roots/<n>.root.json`` are kept for ever, ``targets/<sha256>`` while
metadata names them. Nothing read from here is believed before ``chain.verify`` has checked it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from garrison_agent.registry.files import disk_errors, write_atomic
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import RefusedError


class StoredState(BaseModel):
    """Metadata as it came, exact text, and the version of the root that vouches for it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    root: int
    timestamp: str
    snapshot: str
    targets: str
    families: dict[str, str] = {}
    """Delegated roles' metadata by role: only those that this board has had to ask."""


class MetadataCache:
    """The cache in ``folder``; one process at a time writes, inside ``lock()``. Reading needs no lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "trusted.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Wait until no other process refreshes, and keep others out."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty folder that is gone afterwards, and after a crash at the next call. Needs the lock."""
        for left_over in self._folder.glob("incoming-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with disk_errors(self._folder):
            folder = Path(tempfile.mkdtemp(prefix="incoming-", dir=self._folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def roots(self) -> dict[int, bytes]:
        """Return the root files by the version in their names."""
        found = {}
        for path in (self._folder / "roots").glob("*.root.json"):
            version = path.name.removesuffix(".root.json")
            if version.isdecimal():
                found[int(version)] = path.read_bytes()
        return found

    def keep_root(self, version: int, data: bytes) -> None:
        """Keep a verified root for ever."""
        write_atomic(self._folder / "roots" / f"{version}.root.json", data)

    def load(self) -> StoredState | None:
        """Return the last committed state, or None before the first.

        Raises:
            RefusedError: ``registry.damaged``.
        """
        try:
            data = self._state.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return StoredState.model_validate_json(data)
        except ValidationError as error:
            raise RefusedError(
                "registry.damaged",
                f"{self._state} is damaged",
                hint="the next refresh from the controller replaces it; installed models keep running",
            ) from error

    def commit(self, state: StoredState) -> None:
        """Make ``state``, just verified, the one to rely on. Durable on return."""
        data = state.model_dump_json().encode()
        with contextlib.suppress(FileNotFoundError):
            if self._state.read_bytes() == data:
                return  # spares the flash
        write_atomic(self._state, data)

    def target(self, sha256: str) -> bytes | None:
        """Return the kept target with this digest, or None when it is missing or damaged."""
        try:
            data = (self._folder / "targets" / sha256).read_bytes()
        except FileNotFoundError:
            return None
        return data if sha256_hex(data) == sha256 else None

    def keep_target(self, sha256: str, data: bytes) -> None:
        """Keep a target whose digest was checked."""
        write_atomic(self._folder / "targets" / sha256, data)

    def prune_targets(self, named: Collection[str]) -> None:
        """Drop kept targets that metadata no longer names by their digests."""
        for path in (self._folder / "targets").glob("*"):
            if path.name not in named:
                path.unlink()
