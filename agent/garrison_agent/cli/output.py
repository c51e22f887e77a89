"""What commands print: JSON for programs, aligned tables and short phrases for people."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TextIO

from garrison_protocol.errors import GarrisonError

_MIB = 1024 * 1024
_NARROWEST = 30
"""Text is not folded into less than this."""


def print_json(value: object) -> None:
    """Print ``value`` as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(error: GarrisonError, output: str) -> None:
    """Print ``error`` on standard error: message and hint, or the JSON that REST clients see."""
    if output == "json":
        print(json.dumps({"error": error.to_dict()}), file=sys.stderr)
        return
    print(fold(f"error: {error.message} ({error.code})", "  ", sys.stderr), file=sys.stderr)
    if error.hint:
        print(fold(f"hint: {error.hint}", "  ", sys.stderr), file=sys.stderr)


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> str:
    """Return an aligned table; columns named in ``right`` are right-aligned. None is shown as ``-``.

    On a terminal that is too narrow, columns named in ``spare`` are left out, the first of them first.
    """
    cells = [list(heads), *([_cell(value) for value in row] for row in rows)]
    widths = {head: max(len(row[column]) for row in cells) for column, head in enumerate(heads)}
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for head in spare:
        if room is not None and sum(widths.values()) + 2 * (len(widths) - 1) > room:
            widths.pop(head, None)
    lines = []
    for row in cells:
        parts = [
            text.rjust(widths[head]) if head in right else text.ljust(widths[head])
            for text, head in zip(row, heads, strict=True)
            if head in widths
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def dim(text: str) -> str:
    """Return ``text`` in the colour of side remarks, for standard error, if that is a terminal that has colours."""
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def printable(text: str) -> str:
    """Return ``text`` as a terminal may have it: what would steer the terminal is shown, not obeyed."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Return ``name  value`` lines with the values aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(fold(f"{name.ljust(width)}  {_cell(value)}".rstrip(), " " * (width + 2)) for name, value in rows)


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def size(size_bytes: int) -> str:
    """Return a size in the unit that leaves few digits: ``0.9 MiB``, ``87 MiB``, ``1.4 GiB``."""
    mib = size_bytes / _MIB
    if mib >= 1024:
        return f"{mib / 1024:.1f} GiB"
    return f"{mib:.1f} MiB" if mib < 10 else f"{mib:.0f} MiB"


def fold(text: str, indent: str, out: TextIO | None = None) -> str:
    """Return ``text`` for a terminal: long lines go on behind ``indent``. Where nobody looks it stays one line.

    ``out`` is where it will be written; None: standard output.
    """
    if not (out or sys.stdout).isatty():
        return text
    width = shutil.get_terminal_size().columns
    if width - len(indent) < _NARROWEST:
        return text
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def duration(seconds: float) -> str:
    """Return a duration with its two largest units: ``3 d 4 h``, ``12 min 5 s``, ``8 s``."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def moment(unix_seconds: int | None) -> str | None:
    """Return a time in the local zone, ``2025-03-01 14:05:09``."""
    return None if unix_seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))
