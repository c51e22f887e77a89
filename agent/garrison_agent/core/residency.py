"""What may be in memory together: whether a candidate fits beside the serving model, or only instead of it. Pure.

Sizes are the manifests' estimates of a worker's resident memory, in MiB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model."""

    alias: str
    memory_mb: int


class Placement(StrEnum):
    """How a candidate comes into memory."""

    BESIDE = "beside"
    INSTEAD = "instead"
    BUSY = "busy"
    """Other aliases hold the memory; it may become free."""
    NEVER = "never"
    """More than the whole budget."""


def place(alias: str, needed_mb: int, budget_mb: int, loaded: Iterable[Resident]) -> Placement:
    """Return how a candidate for ``alias`` comes into memory.

    ``loaded`` holds every model that is in memory or on its way there. The serving model of ``alias`` leaves only if
    that is what makes room: a switch without a gap is worth more than the memory.
    """
    if needed_mb > budget_mb:
        return Placement.NEVER
    residents = list(loaded)
    used_mb = sum(resident.memory_mb for resident in residents)
    if used_mb + needed_mb <= budget_mb:
        return Placement.BESIDE
    own_mb = sum(resident.memory_mb for resident in residents if resident.alias == alias)
    if own_mb and used_mb - own_mb + needed_mb <= budget_mb:
        return Placement.INSTEAD
    return Placement.BUSY
