"""Histograms of requests under OpenTelemetry's names for generative AI. Pure.

Names, attributes, and bucket boundaries: OpenTelemetry semantic conventions, "Generative AI metrics". Nothing here
holds a word of a prompt or an answer.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple, TypeAlias

from garrison_agent.core.health import is_error
from garrison_agent.runtimes.status import RequestRecord

USAGE = "gen_ai.client.token.usage"
DURATION = "gen_ai.server.request.duration"
LATENCY = "gen_ai.server.time_to_first_token"
PACE = "gen_ai.server.time_per_output_token"

MODEL = "gen_ai.request.model"
OPERATION = "gen_ai.operation.name"
SIDE = "gen_ai.token.type"
ERROR = "error.type"
OTHER = "_OTHER"
"""What OpenTelemetry calls an error, and we anything, beyond what is told apart."""

MAX_SERIES = 256
"""Of all instruments; requests beyond are counted together, so that nothing can fill a board's memory."""

_OPERATIONS = {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}


class Instrument(NamedTuple):
    """What is measured: ``bounds`` are the buckets' upper limits, ``unit`` as in UCUM."""

    unit: str
    bounds: tuple[float, ...]
    description: str


INSTRUMENTS = {
    USAGE: Instrument(
        "{token}", tuple(4.0**power for power in range(14)), "Tokens of prompts (input) and answers (output)"
    ),
    DURATION: Instrument(
        "s", tuple(0.01 * 2**power for power in range(14)), "Time from a request's arrival to its end"
    ),
    LATENCY: Instrument(
        "s",
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
        "Time from a request's arrival to its first token",
    ),
    PACE: Instrument(
        "s",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
        "Time per token after the first one",
    ),
}

Labels: TypeAlias = tuple[tuple[str, str], ...]


class Histogram:
    """Counts by bucket (one more than there are bounds), and the sum of all values."""

    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0

    def merge(self, other: Histogram) -> None:
        """Add what ``other`` counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Meters:
    """Histograms by instrument and labels. Not for several threads."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, Labels], Histogram] = {}

    def add(self, alias: str, record: RequestRecord) -> None:
        """Count one request to the model called ``alias``."""
        labels: Labels = ((MODEL, alias), (OPERATION, _OPERATIONS.get(record.kind, record.kind)))
        failed: Labels = ((ERROR, record.error_code),) if record.error_code else ()
        self._observe(DURATION, labels + failed, record.duration_ms / 1000)
        if record.ttft_ms is not None and not is_error(record):
            self._observe(LATENCY, labels, record.ttft_ms / 1000)
        if record.tokens_per_s:
            self._observe(PACE, labels, 1 / record.tokens_per_s)
        for kind, tokens in (("input", record.prompt_tokens), ("output", record.completion_tokens)):
            if tokens:
                self._observe(USAGE, (*labels, (SIDE, kind)), tokens)

    def merge(self, other: Meters) -> None:
        """Add what ``other`` counted."""
        for (name, labels), histogram in other.series.items():
            self._histogram(name, labels).merge(histogram)

    def rows(self) -> list[dict[str, str | int | bool | None]]:
        """Return one telemetry row's facts for each model and operation (docs/protocol.md, "Telemetry").

        Counts are by bucket, not summed up, without the zeros at the end; sums of times in microseconds.
        """
        found: dict[tuple[str, str], dict[str, Histogram]] = {}
        errors: dict[tuple[str, str], int] = {}
        for (name, labels), histogram in self.series.items():
            facts = dict(labels)
            place = facts[MODEL], facts[OPERATION]
            named = f"{name}.{facts[SIDE]}" if SIDE in facts else name
            together = found.setdefault(place, {}).setdefault(named, Histogram(len(histogram.counts)))
            together.merge(histogram)
            if ERROR in facts:
                errors[place] = errors.get(place, 0) + sum(histogram.counts)
        rows = []
        for (model, operation), histograms in sorted(found.items()):
            row: dict[str, str | int | bool | None] = {
                "model": model,
                "operation": operation,
                "not_answered": errors.get((model, operation), 0),
            }
            for name, histogram in sorted(histograms.items()):
                row[name] = " ".join(map(str, _trimmed(histogram.counts)))
                row[f"{name}.sum"] = round(histogram.sum * (1 if name.startswith(USAGE) else 1_000_000))
            rows.append(row)
        return rows

    def _observe(self, name: str, labels: Labels, value: float) -> None:
        histogram = self._histogram(name, labels)
        histogram.counts[bisect_left(INSTRUMENTS[name].bounds, value)] += 1
        histogram.sum += value

    def _histogram(self, name: str, labels: Labels) -> Histogram:
        found = self.series.get((name, labels))
        if found is None and len(self.series) >= MAX_SERIES:
            labels = tuple((key, value if key == SIDE else OTHER) for key, value in labels)
            found = self.series.get((name, labels))
        if found is None:
            found = self.series[name, labels] = Histogram(len(INSTRUMENTS[name].bounds) + 1)
        return found


def _trimmed(counts: list[int]) -> list[int]:
    last = max((place for place, count in enumerate(counts) if count), default=-1)
    return counts[: last + 1]
