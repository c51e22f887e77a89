"""A token bucket: how much may be used now, and how long to wait for more. Pure.

Amounts are requests or tokens; times are monotonic seconds. A bucket holds a minute's allowance, so that a client may
use it in one go, and refills evenly.
"""

from __future__ import annotations

from typing import NamedTuple

_MINUTE_S = 60.0


class Bucket(NamedTuple):
    """``level`` is what was left at ``at_s``; below zero: more was used than there was."""

    per_minute: int
    level: float
    at_s: float

    @classmethod
    def full(cls, per_minute: int, now_s: float) -> Bucket:
        """Return a bucket that nobody has used yet; ``per_minute`` is at least 1."""
        return cls(per_minute, float(per_minute), now_s)

    def left(self, now_s: float) -> float:
        """Return how much may be used now; negative while debts are paid off."""
        refilled = self.level + max(0.0, now_s - self.at_s) * self.per_minute / _MINUTE_S
        return min(float(self.per_minute), refilled)

    def take(self, amount: float, now_s: float) -> Bucket:
        """Return the bucket after ``amount`` was used, whether it was there or not."""
        return Bucket(self.per_minute, self.left(now_s) - amount, now_s)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return how long until ``amount`` is there; 0: it is. ``amount`` is at most a minute's allowance."""
        return max(0.0, (amount - self.left(now_s)) * _MINUTE_S / self.per_minute)

    def full_s(self, now_s: float) -> float:
        """Return how long until the whole allowance is there again."""
        return self.wait_s(self.per_minute, now_s)
