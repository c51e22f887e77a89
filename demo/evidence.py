"""What was sent and what was received, read from the two databases and compared."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

Key = tuple[str, int, str]
"""(epoch, seq, hash)"""


@dataclass(frozen=True)
class Comparison:
    """One stream of one board."""

    board: str
    stream: str
    sent: int
    received: int
    duplicates: int
    missing: int

    @property
    def exact(self) -> bool:
        """Tell whether everything sent was received, once, and nothing else."""
        return self.missing == 0 and self.duplicates == 0 and self.sent == self.received


def compare(board: str, stream: str, board_database: Path, controller_database: Path) -> Comparison:
    """Compare a stream's rows on the board with those at the controller.

    The board goes on recording while this looks, so it is read first: what it had acknowledged then must have come.
    """
    with sqlite3.connect(f"file:{board_database}?mode=ro", uri=True) as store:
        sent: set[Key] = set(
            store.execute(
                "SELECT e.epoch, e.seq, e.hash FROM entry e JOIN stream s ON s.stream = e.stream AND s.epoch = e.epoch"
                " WHERE e.stream = ? AND e.seq <= s.acked",
                (stream,),
            )
        )
        first = min((seq for _, seq, _ in sent), default=1)
    with sqlite3.connect(f"file:{controller_database}?mode=ro", uri=True) as store:
        rows: list[Key] = list(
            store.execute("SELECT epoch, seq, hash FROM stream_row WHERE device_id = ? AND stream = ?", (board, stream))
        )
    last = max((seq for _, seq, _ in sent), default=0)
    received = [row for row in rows if first <= row[1] <= last]
    return Comparison(
        board,
        stream,
        len(sent),
        len(received),
        len(received) - len({(epoch, seq) for epoch, seq, _ in received}),
        len(sent - set(received)),
    )
