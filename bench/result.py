"""What a benchmark found, and how it reads: a Markdown table for people, JSON for programs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.machine import Machine


@dataclass(frozen=True)
class Budget:
    """A bound from docs/performance.md on the ratio (``of_ratio``) or on the figure itself."""

    text: str
    limit: float
    at_least: bool
    of_ratio: bool

    def met(self, figure: float, ratio: float | None) -> bool:
        """Tell whether the bound holds."""
        value = ratio if self.of_ratio else figure
        if value is None:
            return False
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Measure:
    """One line of the table. ``yardstick`` was measured beside ``figure`` in the same unit; None: there is none."""

    what: str
    figure: float
    unit: str
    yardstick: float | None = None
    yardstick_name: str = ""
    ratio: float | None = None
    budget: Budget | None = None
    samples: tuple[float, ...] = ()
    """The ratios (or figures) that the median is of, in the order of measuring."""

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED``, or nothing where there is no budget."""
        if self.budget is None:
            return ""
        return "met" if self.budget.met(self.figure, self.ratio) else "MISSED"


@dataclass(frozen=True)
class Findings:
    """What one benchmark returns: its lines, and in words what was compared with what."""

    method: str
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Run:
    """Findings with the circumstances they were made in."""

    name: str
    findings: Findings
    seconds: float
    load_before: float
    load_after: float


def run(name: str, benchmark: Callable[[], Findings]) -> Run:
    """Return what ``benchmark`` found, and the machine's one-minute load average before and after."""
    before, began_s = os.getloadavg()[0], time.monotonic()
    findings = benchmark()
    return Run(name, findings, time.monotonic() - began_s, before, os.getloadavg()[0])


def as_markdown(command: str, machine: Machine, runs: Sequence[Run]) -> str:
    """Return a report that can stand in a document as it is."""
    lines = [f"`{command}`", "", f"{machine}", ""]
    for one in runs:
        lines += [
            f"**{one.name}** ({one.seconds:.0f} s, load average {one.load_before:.1f} before,"
            f" {one.load_after:.1f} after): {one.findings.method}",
            "",
            "| what | figure | beside it | ratio | spread | budget | |",
            "|---|---|---|---|---|---|---|",
            *(_line(measure) for measure in one.findings.measures),
            "",
        ]
    return "\n".join(lines)


def as_json(command: str, machine: Machine, runs: Sequence[Run]) -> str:
    """Return the same report with every sample."""
    found: list[dict[str, Any]] = []
    for one in runs:
        measures = [asdict(measure) | {"verdict": measure.verdict} for measure in one.findings.measures]
        found.append(asdict(one) | {"findings": {"method": one.findings.method, "measures": measures}})
    return json.dumps({"command": command, "machine": asdict(machine), "runs": found}, indent=2)


def _line(measure: Measure) -> str:
    beside = "" if measure.yardstick is None else f"{_number(measure.yardstick)} {measure.unit}"
    if measure.yardstick_name:
        beside += f" ({measure.yardstick_name})"
    cells = (
        measure.what,
        f"{_number(measure.figure)} {measure.unit}",
        beside.strip(),
        "" if measure.ratio is None else f"{measure.ratio:.2f}",
        f"{_number(min(measure.samples))}-{_number(max(measure.samples))}" if measure.samples else "",
        measure.budget.text if measure.budget else "",
        measure.verdict,
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
