"""What ``bench`` measured before: JSON lines in the user's state folder (XDG base directories)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from garrison_protocol.errors import InvalidError

Record = dict[str, Any]
MAX_LINES = 10_000
"""Older results are not looked at."""


def history_path() -> Path:
    """Return where results are kept."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "garrison" / "bench.jsonl"


def append(records: list[Record]) -> None:
    """Keep the results of one run.

    Raises:
        InvalidError: ``cli.file_unusable``.
    """
    path = history_path()
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise InvalidError(
            "cli.file_unusable",
            f"the results cannot be kept in {path}: {error.strerror}",
            hint="set XDG_STATE_HOME to a folder of yours",
        ) from error


def read() -> list[Record]:
    """Return what was kept, oldest first; lines of another make are passed over.

    Raises:
        InvalidError: ``cli.file_unusable``.
    """
    path = history_path()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidError(
            "cli.file_unusable", f"{path} cannot be read: {error.strerror}", hint="check its owner"
        ) from error
    return [record for line in lines[-MAX_LINES:] if (record := _parse(line)) is not None]


def change(record: Record, earlier: list[Record]) -> float | None:
    """Return by how many percent ``record`` is faster than the newest like it in ``earlier``, None for the first."""
    before = next((one for one in reversed(earlier) if _like(one) == _like(record)), None)
    if before is None or not before["avg_ts"]:
        return None
    return float(100 * (record["avg_ts"] / before["avg_ts"] - 1))


def _like(record: Record) -> tuple[object, ...]:
    return record["model"], record["variant"], record["test"], record["cpu_info"]


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
        texts = [record[key] for key in ("model", "alias", "variant", "test", "cpu_info", "test_time", "unit")]
        numbers = [record[key] for key in ("avg_ts", "stddev_ts")]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    sound = all(isinstance(one, str) for one in texts) and all(isinstance(one, int | float) for one in numbers)
    return record if sound else None
