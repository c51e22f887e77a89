"""What a viewer of the demo sees: one line of evidence a step, progress in between, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table

from demo.processes import StepError

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


class Steps:
    """Runs steps in order and remembers how each went."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done: list[tuple[str, str, float]] = []

    def run(self, title: str, action: Callable[[], str]) -> None:
        """Run one step; ``action`` returns its evidence in a line.

        Raises:
            StepError: The step failed.
        """
        number = len(self._done) + 1
        began = time.monotonic()
        console.print(f"[bold]{number:2d}/{self._total}[/bold] {title}")
        evidence = action()
        took = time.monotonic() - began
        note(f"[green]ok[/green] {evidence} [dim]({took:.0f} s)[/dim]")
        self._done.append((title, evidence, took))

    @property
    def failed_number(self) -> int:
        """The number of the step under way."""
        return len(self._done) + 1

    def summary(self) -> None:
        """Print the table of all steps."""
        table = Table(title="Garrison: the main job", show_lines=False, expand=False)
        table.add_column("step", justify="right")
        table.add_column("what", no_wrap=True)
        table.add_column("evidence")
        table.add_column("s", justify="right")
        for number, (title, evidence, took) in enumerate(self._done, 1):
            table.add_row(str(number), title, evidence, f"{took:.0f}")
        console.print(table)


def coloured(word: str) -> str:
    """Return a state of a rollout or a board in its colour."""
    if word in {"FINISHED", "SUCCEEDED", "ACTIVE"}:
        return f"[green]{word}[/green]"
    if word in {"PAUSED", "FAILED", "ERROR", "ROLLED_BACK", "REJECTED"}:
        return f"[red]{word}[/red]"
    return word if word in {"SCHEDULED", "-"} else f"[cyan]{word}[/cyan]"


def note(text: str) -> None:
    """Print a line of detail under a step."""
    console.print(Padding(text, (0, 0, 0, 6), expand=False))


def watch(render: Callable[[], Table], finished: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Show a live table until ``finished``; without a terminal, print it once at the end.

    Raises:
        StepError: Time ran out.
    """
    deadline = time.monotonic() + timeout_s
    with Live(render(), console=console, refresh_per_second=4, transient=False) as live:
        while not finished():
            if time.monotonic() > deadline:
                raise StepError(f"after {timeout_s:.0f} s still waiting for: {what}")
            time.sleep(0.5)
            live.update(render())
        live.update(render())
    if not console.is_terminal:
        console.print()
