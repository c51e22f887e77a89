"""What must be the same before and after an attack: files by digest, and tables but for those that hold evidence."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

EVIDENCE_TABLES = frozenset({"entry", "stream", "refusal"})
"""Of ``agent.db``: the journal, its heads, and the counts of refused messages."""
PASSING_KEYS = ("connection.", "disk.", "journal.", "report.", "time.")
"""Of ``agent.db``'s ``meta``: what changes with time, connections, and reports."""
_KEPT = "registry.kept"


def files(folder: Path, *without: str) -> dict[str, str]:
    """Return the digest of each file and the target of each link below ``folder``, but those beginning ``without``."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(("agent.db", *without)) or path.name == "lock":
            continue
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def board_tables(connection: sqlite3.Connection) -> dict[str, list[object]]:
    """Return what a board's store holds besides evidence: slots, high-water marks, applied desired state, trust."""
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found: dict[str, list[object]] = {}
    for name in sorted(set(names) - EVIDENCE_TABLES):
        rows = connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()  # our own table names
        found[name] = [_lasting(row) for row in rows if not row[0].startswith(PASSING_KEYS)] if name == "meta" else rows
    return found


def _lasting(row: tuple[str, str]) -> tuple[str, object]:
    """Return a row of ``meta``, that of trusted metadata without the moment of its last check."""
    key, value = row
    if key != _KEPT:
        return row
    return key, {name: part for name, part in json.loads(value).items() if name != "refreshed_at"}


def controller_tables(path: Path, *without: str) -> dict[str, list[object]]:
    """Return every row of a controller's database, but of ``refusal`` and the tables in ``without``."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as store:
        names = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        kept = sorted(set(names) - {"refusal", *without})
        return {name: store.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in kept}
