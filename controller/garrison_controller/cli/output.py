"""What commands print: tables for people, JSON for programs, errors with a hint."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
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
    ) -> None:
        """Print ``rows``. ``columns`` maps keys of a row to headings; JSON prints ``document``, or else the rows."""
        if self.json:
            self.document(rows if document is None else document)
            return
        if not rows:
            self.console.print(empty)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in columns.values():
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell(row.get(key))) for key in columns))
        self.console.print(table)
        if footer:
            self.console.print(escape(footer))

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
            self.console.print(escape(sentence), soft_wrap=True)

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
            return ", ".join(f"{key}={item}" for key, item in value.items()) or NOTHING
        case list() | tuple():
            return ", ".join(str(item) for item in value)
        case _:
            return str(value)


def note(sentence: str) -> None:
    """Print a remark to standard error."""
    Console(stderr=True, highlight=False).print(escape(sentence), soft_wrap=True)


def print_error(error: GarrisonError) -> int:
    """Print what happened and what to do next to standard error; return the exit status."""
    sys.stderr.write(f"error: {error.message} ({error.code})\n")
    sys.stderr.write(f"hint: {error.hint or 'run the command with --help, or see the documentation of errors'}\n")
    return error.exit_status
