"""A clock that only looks move on: what takes how long depends on no machine and on nothing else that it does."""

from __future__ import annotations


class Ticks:
    """Says ``step_s`` more at each look; ``now_s`` may be set on."""

    def __init__(self, step_s: float) -> None:
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        """Return the time, in seconds."""
        self.now_s += self.step_s
        return self.now_s
