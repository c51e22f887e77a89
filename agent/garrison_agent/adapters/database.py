"""The board's one SQLite store: every table, its migrations, and durable transactions (docs/architecture.md, "Agent").

Only the owner thread uses it. WAL with ``synchronous=FULL``: a commit that returned survives a power cut. Others may
read the file while the agent runs. On a full disk the ballast beside it makes room for decisions.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from garrison_agent.adapters.ballast import Ballast, FreeBytes, free_bytes
from garrison_agent.registry.files import sync_folder
from garrison_protocol.errors import ConflictError, GarrisonError, InsufficientError, UnavailableError

BUSY_TIMEOUT_MS = 5000
"""How long a write waits for a reader outside that blocks a checkpoint."""
CHECKPOINT_PAGES = 1000
SCARCE_CHECKPOINT_PAGES = 64
"""Without the ballast the WAL is kept short, or it alone would take the room."""

MIGRATIONS: tuple[str, ...] = (
    # 1: the first layout. `entry` holds the rows of both streams exactly as they are sent; `stream` their heads.
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE slot (alias TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE stream (
        stream TEXT PRIMARY KEY,
        epoch TEXT NOT NULL,
        seq INTEGER NOT NULL,
        hash TEXT NOT NULL,
        acked INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
    CREATE TABLE entry (
        stream TEXT NOT NULL,
        epoch TEXT NOT NULL,
        seq INTEGER NOT NULL,
        kind TEXT NOT NULL,
        hash TEXT NOT NULL,
        header TEXT NOT NULL,
        body TEXT,
        salt TEXT,
        PRIMARY KEY (stream, epoch, seq)
    );
    CREATE INDEX entry_with_body ON entry (kind, seq) WHERE body IS NOT NULL;
    CREATE TABLE high_water (role TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE refusal (code TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
    """,
    # 2: applications that share the local API, each with the digest of its key and its limits as JSON.
    """
    CREATE TABLE app (name TEXT PRIMARY KEY, key_sha256 TEXT NOT NULL UNIQUE, record TEXT NOT NULL) WITHOUT ROWID;
    """,
)


class Database:
    """The open store. At most one agent holds it; a lock beside it keeps a second one out."""

    def __init__(self, path: Path, free: FreeBytes = free_bytes) -> None:
        """Open ``path``, creating it (mode 0600) and bringing its tables up to date.

        Opening needs room too (the WAL and its index): on a full disk the ballast gives it.

        Raises:
            ConflictError: ``database.in_use`` by another agent, ``database.newer`` than this version knows.
            InsufficientError: ``disk.full``, and there is no ballast (any more).
            GarrisonError: ``database.damaged``.
        """
        self.path = path
        self.ballast = Ballast(path.with_name(path.name + ".ballast"), free)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _hold_lock(path)
        self._depth = 0
        self._doomed = False
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            sync_folder(path.parent)
            held = self.ballast.held
            try:
                self._connect()
            except InsufficientError:
                if not held:
                    raise
                self.ballast.drop()
                self._connect()
            self.restore_ballast()
        except BaseException:
            os.close(self._lock)
            raise

    @contextmanager
    def transaction(self, *, spare: bool = False) -> Iterator[None]:
        """Run the block in one transaction, durable when this returns; nested use joins the outer one.

        A nested block that raised dooms the whole: half of a decision is never committed. One that can be done
        without (``spare``) is refused before it begins where the room must be left to decisions; for a decision the
        ballast is given up.

        Raises:
            InsufficientError: ``disk.full``; nothing of the block was kept.
            GarrisonError: ``database.damaged``, ``database.locked``, or ``database.failed``; likewise.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            except BaseException:
                self._doomed = True
                raise
            finally:
                self._depth -= 1
            return
        self._make_room(spare)
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            self._depth = 1
            yield
            if self._doomed:
                raise RuntimeError("a nested transaction failed, so the outer one cannot be committed")
            self.connection.execute("COMMIT")
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # our own mistake, not the disk's
        except sqlite3.Error as error:
            failure = translate(error, self.path)
            if isinstance(failure, InsufficientError) and not spare:
                self.ballast.drop()  # room was not what it seemed (a quota, a race): the next try will find it
            raise failure from error
        finally:
            self._depth = 0
            self._doomed = False
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def get(self, key: str) -> str | None:
        """Return what ``put`` stored under ``key``, or None."""
        row = self.connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, value: str, *, spare: bool = False) -> None:
        """Store ``value`` under ``key``, in the caller's transaction or its own, which may be ``spare``."""
        with self.transaction(spare=spare):
            self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def restore_ballast(self) -> None:
        """Have the ballast again where there is room, and write as usual; else sparingly."""
        self.ballast.make()
        self._set_checkpoint()

    def close(self) -> None:
        """Close the store and let another agent open it."""
        self.connection.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _make_room(self, spare: bool) -> None:
        if spare:
            if self.ballast.scarce:
                raise _full(self.path)
        elif self.ballast.held and self.ballast.full:
            self.ballast.drop()
            self._set_checkpoint()

    def _set_checkpoint(self) -> None:
        pages = SCARCE_CHECKPOINT_PAGES if self.ballast.scarce else CHECKPOINT_PAGES
        self.connection.execute(f"PRAGMA wal_autocheckpoint = {pages}").fetchone()

    def _connect(self) -> None:
        self.connection = sqlite3.connect(self.path, isolation_level=None, timeout=BUSY_TIMEOUT_MS / 1000)
        try:
            self._prepare()
        except BaseException:
            self.connection.close()
            raise

    def _prepare(self) -> None:
        try:
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",
                "foreign_keys = ON",
                "cache_size = -1024",  # KiB; the default of 2 MiB buys a board nothing
                "journal_size_limit = 4194304",
            ):
                self.connection.execute(f"PRAGMA {pragma}").fetchone()
            version: int = self.connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        if version > len(MIGRATIONS):
            raise ConflictError(
                "database.newer",
                f"{self.path} was written by a newer garrison-agent "
                f" (layout {version}, this one knows {len(MIGRATIONS)})",
                hint="install the newer version again; a board's record is never converted backwards",
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            with self.transaction():
                for statement in script.split(";"):
                    self.connection.execute(statement)
                self.connection.execute(f"PRAGMA user_version = {number}")


def translate(error: sqlite3.Error, path: Path) -> GarrisonError:
    """Return what a failure of SQLite means to the agent."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")):  # the latter: not even the WAL's index finds room
        return _full(path)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return GarrisonError(
            "database.damaged",
            f"{path} is damaged: {error}",
            hint="keep a copy for the auditor, move the file away, and start the agent; it opens a new epoch",
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UnavailableError(
            "database.locked",
            f"{path} is locked by another program",
            hint="end the program that holds a transaction on it",
            retryable=True,
        )
    return GarrisonError("database.failed", f"{path}: {error}", hint="check the disk with `dmesg`")


def _full(path: Path) -> InsufficientError:
    return InsufficientError(
        "disk.full",
        f"{path} cannot grow: the disk is full",
        hint="free space (`garrison-agent cache list`); what was recorded before is kept",
        retryable=True,
    )


def _hold_lock(path: Path) -> int:
    """Return a descriptor that keeps other agents away from ``path`` while it is open.

    Not on the store itself: closing any descriptor of that file would drop SQLite's own locks.
    """
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConflictError(
            "database.in_use",
            f"another garrison-agent holds {path}",
            hint="stop it first (`systemctl stop garrison-agent`)",
        ) from error
    return descriptor
