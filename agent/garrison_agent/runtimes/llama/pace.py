"""How much of a prompt one decode call may take, by what prompts were seen to cost. Pure."""

from __future__ import annotations

SHARED_S = 0.1
"""For how long reading a prompt may hold up the answers that run."""
ALONE_S = 1.0
"""For how long it may hold up a request that has yet to come."""
SHARED_ROWS = (16, 128)
ALONE_ROWS = (128, 1 << 20)
"""Bounds: fewer rows read the weights too often for what they bring (16 rows cost a tenth more per row than 128)."""
MAX_S = 4.0
"""No batch shall take longer, on however slow a board: in the middle of one, a worker cannot show that it gets on, and
somebody may have set the time for that to 5 s."""
ENOUGH_ROWS = 8
"""Fewer teach nothing, so no batch is smaller: what a cold disk made slow once would stay so."""
_WEIGHT = 0.3


class Pace:
    """Learns what a prompt's row costs."""

    def __init__(self) -> None:
        self._row_s: float | None = None

    def rows(self, beside: int) -> int:
        """Return how many rows of prompts the next batch may hold; ``beside``: rows of answers that run."""
        wanted_s, (least, most) = (SHARED_S, SHARED_ROWS) if beside else (ALONE_S, ALONE_ROWS)
        if self._row_s is None:
            return ENOUGH_ROWS
        least = min(least, max(1, max(ENOUGH_ROWS, int(MAX_S / self._row_s)) - beside))
        return min(max(int(wanted_s / self._row_s), least), most)

    def learn(self, rows: int, took_s: float) -> None:
        """Take in that a batch of ``rows``, most of them a prompt's, took so long."""
        if rows < ENOUGH_ROWS:
            return
        row_s = max(took_s, 1e-6) / rows
        self._row_s = row_s if self._row_s is None else self._row_s + _WEIGHT * (row_s - self._row_s)
