"""How long to wait before trying again. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Doubling waits from ``base_s`` up to ``cap_s`` seconds."""

    base_s: float
    cap_s: float

    def delay_s(self, tries: int) -> float:
        """Return the wait after ``tries`` failures (1 or more)."""
        exponent = min(max(tries, 1) - 1, 32)
        return float(min(self.cap_s, self.base_s * 2**exponent))


NETWORK = Backoff(base_s=5, cap_s=600)
"""Downloads, repairs, and metadata: somebody else's machine."""
WORKER = Backoff(base_s=1, cap_s=300)
"""A crashed or failing model worker on this board."""
GIVEN_UP_S = 1800.0
"""A worker that failed too often in a row: what ails it may be gone by then, and a try now and then costs little."""
SPACE = Backoff(base_s=30, cap_s=900)
"""Disk or memory that somebody must free."""


def jittered(delay_s: float, chance: float) -> float:
    """Spread a wait over its upper half, so that a fleet does not return in step. ``chance`` is in [0, 1)."""
    return delay_s * (0.5 + chance / 2)
