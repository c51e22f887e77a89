"""Prometheus' text exposition format 0.0.4, and the agent's meters in it. Pure.

Names follow OpenTelemetry's rules for Prometheus: dots become underscores, and the unit stands behind the name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from garrison_agent.core.meters import INSTRUMENTS, Meters

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
MODEL_LABEL = "gen_ai_request_model"
"""The label that names a model's alias, on every sample about one."""


class Sample(NamedTuple):
    """One value. ``suffix`` goes behind the family's name (``_bucket``, ``_sum``, ``_count``)."""

    labels: Mapping[str, str]
    value: float
    suffix: str = ""


class Family(NamedTuple):
    """Samples of one name. ``kind`` is ``counter``, ``gauge``, or ``histogram``."""

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...]

    def only(self, wanted: Callable[[str], bool]) -> Family:
        """Return the family without samples of models that are not ``wanted``, by alias."""
        kept = (one for one in self.samples if MODEL_LABEL not in one.labels or wanted(one.labels[MODEL_LABEL]))
        return self._replace(samples=tuple(kept))


def gauge(name: str, help: str, value: float) -> Family:
    """Return a family of one value without labels."""
    return Family(name, "gauge", help, (Sample({}, value),))


def histograms(meters: Meters) -> list[Family]:
    """Return a family for each instrument that has counted something."""
    samples: dict[str, list[Sample]] = {}
    for (name, labels), histogram in sorted(meters.series.items()):
        named = {key.replace(".", "_"): value for key, value in labels}
        mine, total = samples.setdefault(name, []), 0
        for bound, count in zip((*INSTRUMENTS[name].bounds, float("inf")), histogram.counts, strict=True):
            total += count
            mine.append(Sample({**named, "le": _number(bound)}, total, "_bucket"))
        mine += [Sample(named, histogram.sum, "_sum"), Sample(named, total, "_count")]
    return [
        Family(_metric_name(name), "histogram", INSTRUMENTS[name].description, tuple(found))
        for name, found in samples.items()
    ]


def render(families: Iterable[Family]) -> str:
    """Return the page that Prometheus reads; families without samples are left out."""
    lines = []
    for family in families:
        if not family.samples:
            continue
        lines.append(f"# HELP {family.name} {_escaped(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for sample in family.samples:
            labels = ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in sample.labels.items())
            lines.append(f"{family.name}{sample.suffix}{{{labels}}} {_number(sample.value)}")
    return "\n".join([*lines, ""])


def _metric_name(name: str) -> str:
    unit = {"s": "_seconds"}.get(INSTRUMENTS[name].unit, "")
    return re.sub(r"\W", "_", name) + unit


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text
