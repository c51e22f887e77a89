"""What commands print: tables for people, JSON for programs, errors with a hint."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from garrison_protocol.errors import GarrisonError


class OutputFormat(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[OutputFormat, typer.Option("--output", "-o", help="Print a table or JSON.")]
"""Every command's last parameter: ``output: OutputOption = OutputFormat.TABLE``."""

NOTHING = "-"
_MIB = 1024 * 1024
_NUMBER = re.compile(r"\d+(\.\d+)?( [KMG]iB| %)?|-")
_PADDING = re.compile(r" +(\x1b\[0m)?$")
"""A heading's style ends behind its padding, which would break the line on a terminal that is just wide enough."""
_GAP = 2
_NARROWEST = 12
"""A column of prose is never made narrower than this."""


class Output:
    """Standard output in one format. Results go to standard output, everything else to standard error."""

    def __init__(self, output_format: OutputFormat) -> None:
        self.json = output_format is OutputFormat.JSON
        self.console = Console(highlight=False, soft_wrap=False)

    def document(self, value: object) -> None:
        """Print ``value`` as JSON, whatever the format."""
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")

    def table(
        self,
        columns: Mapping[str, str],
        rows: Sequence[Mapping[str, Any]],
        *,
        document: object | None = None,
        empty: str = "Nothing to show.",
        footer: str = "",
        prose: Collection[str] = (),
        spare: Sequence[str] = (),
    ) -> None:
        """Print ``rows``. ``columns`` maps keys of a row to headings; JSON prints ``document``, or else the rows.

        Names, times and digests are never broken, so that they can be read, copied, and found with grep. What a
        terminal is too narrow for: columns in ``prose`` are wrapped, then those in ``spare`` left out, in this order,
        which is said. A row that still does not fit runs over the edge. Where nobody looks, nothing of this is done.
        """
        if self.json:
            self.document(rows if document is None else document)
            return
        if not rows:
            self.console.print(empty)
            return
        cells = {key: [cell(row.get(key)) for row in rows] for key in columns}
        natural = {key: max(map(cell_len, [columns[key], *cells[key]])) + _GAP for key in columns}
        least = {
            key: min(width, max(cell_len(columns[key]), _NARROWEST) + _GAP) if key in prose else width
            for key, width in natural.items()
        }
        dropped: list[str] = []
        width = sum(natural.values())
        if self.console.is_terminal:
            for key in spare:
                if sum(least.values()) - _GAP > self.console.width:
                    dropped.append(columns[key])
                    del cells[key], least[key], natural[key]
            fits = sum(least.values()) - _GAP <= self.console.width
            width = self.console.width if fits else sum(natural.values())
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
        for key, column in cells.items():
            numbers = all(_NUMBER.fullmatch(text) for text in column) and set(column) != {NOTHING}
            justify: Literal["left", "right"] = "right" if numbers else "left"
            table.add_column(columns[key], overflow="fold", no_wrap=key not in prose, justify=justify)
        for line in zip(*cells.values(), strict=True):
            table.add_row(*map(escape, line))
        console = Console(highlight=False, width=width)
        with console.capture() as printed:
            console.print(table)
        sys.stdout.writelines(_PADDING.sub(r"\1", line) + "\n" for line in printed.get().splitlines())
        if dropped:
            note(f"({', '.join(dropped)}: left out, the terminal is too narrow; see -o json)")
        if footer:
            self.console.print(escape(footer), soft_wrap=True)

    def record(self, fields: Mapping[str, Any], *, document: object | None = None) -> None:
        """Print one thing: a line for each field, or JSON."""
        if self.json:
            self.document(fields if document is None else document)
            return
        width = max((len(name) for name in fields), default=0)
        for name, value in fields.items():
            # Never wrapped: digests stand here that people compare and copy.
            self.console.print(f"[bold]{escape(name):{width}}[/bold]  {escape(cell(value))}", soft_wrap=True)

    def done(self, sentence: str, document: object) -> None:
        """Say what was done, or print its JSON."""
        if self.json:
            self.document(document)
        else:
            self.console.print(escape(plain(sentence, "\n")), soft_wrap=True)

    def secret(self, sentence: str, value: str, document: object) -> None:
        """Print a secret once: alone on standard output, so that it can be captured; the sentence beside it."""
        if self.json:
            self.document(document)
            return
        note(sentence)
        sys.stdout.write(value + "\n")


def cell(value: object) -> str:
    """Return ``value`` as one table cell."""
    match value:
        case None | "" | []:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.1f}"
        case dict():
            return plain(", ".join(f"{key}={item}" for key, item in value.items())) or NOTHING
        case list() | tuple():
            return plain(", ".join(str(item) for item in value))
        case _:
            return plain(str(value))


def plain(text: str, keep: str = "") -> str:
    """Return ``text`` with everything made visible that is no letter of its own, but what is in ``keep``.

    Much of what is printed was written by others: what moves a cursor or turns the writing direction would let them
    show something else than there is.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


def size(size_bytes: int) -> str:
    """Return a size in the unit that leaves few digits, as ``garrison-agent`` does: ``3.0 MiB``, ``94 MiB``."""
    if size_bytes < _MIB:
        return f"{size_bytes / 1024:.1f} KiB"
    mib = size_bytes / _MIB
    if mib >= 1024:
        return f"{mib / 1024:.1f} GiB"
    return f"{mib:.1f} MiB" if mib < 10 else f"{mib:.0f} MiB"


def counted(number: int, noun: str) -> str:
    """Return ``1 board``, ``2 boards``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def note(sentence: str) -> None:
    """Print a remark to standard error."""
    Console(stderr=True, highlight=False).print(escape(plain(sentence, "\n")), soft_wrap=True)


def print_error(error: GarrisonError) -> int:
    """Print what happened and what to do next to standard error; return the exit status."""
    sys.stderr.write(plain(f"error: {error.message} ({error.code})\n", "\n"))
    hint = error.hint or f"see {error.code} in docs/errors.md, or run the command with --help"
    sys.stderr.write(plain(f"hint: {hint}\n", "\n"))
    return error.exit_status
