"""Whether a transfer goes on fast enough, so that nobody keeps a board waiting by sending next to nothing. Pure.

Every single read has its time-out, but one byte just before each would pass for ever. So bytes are counted as well.
Source: the attack "slow retrieval" of The Update Framework's specification, section 1.5.2.
"""

from __future__ import annotations

MIN_BYTES_PER_S = 256
"""A twentieth of what 2G brings on a bad day; anything slower is as good as not there."""
PATIENCE_S = 60.0


class Pace:
    """Counts what came of a transfer, and the time spent waiting for it; the caller's own work counts as no time."""

    def __init__(self, within_s: float = PATIENCE_S) -> None:
        """``within_s`` is how long the transfer may be slower than ``MIN_BYTES_PER_S``, or stand still."""
        self.within_s = within_s
        self._waited_s = 0.0
        self._received = 0

    @property
    def min_bytes(self) -> int:
        """How many bytes have to come in each ``within_s``."""
        return round(MIN_BYTES_PER_S * self.within_s)

    @property
    def complaint(self) -> str:
        """What to say of a transfer that is too slow."""
        return f"fewer than {self.min_bytes} bytes came in {self.within_s:.0f} s"

    def add(self, waited_s: float, received: int) -> bool:
        """Count ``received`` bytes that took ``waited_s``; False: it is too slow."""
        self._waited_s += waited_s
        self._received += received
        if self._received < self.min_bytes:
            return self._waited_s < self.within_s
        in_time = self._waited_s <= self.within_s
        self._waited_s, self._received = 0.0, 0
        return in_time
