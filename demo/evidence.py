"""What was sent and what was received, read from the two databases and compared."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

Key = tuple[str, int, str]
"""(epoch, seq, hash)"""
Heads = dict[str, tuple[str, int]]
"""The newest row of each stream: (epoch, seq)."""


@dataclass(frozen=True)
class Comparison:
    """One stream of one board."""

    board: str
    stream: str
    sent: int
    received: int
    duplicates: int
    """Rows whose content the controller holds a second time, under whatever number."""
    missing: int

    @property
    def exact(self) -> bool:
        """Tell whether everything sent was received, once, and nothing else."""
        return self.sent > 0 and self.missing == 0 and self.duplicates == 0 and self.sent == self.received


def heads(database: Path) -> Heads:
    """Return how far a board's streams have come by now, receipts or not."""
    with _open(database) as store:
        rows = store.execute("SELECT stream, epoch, max(seq) FROM entry GROUP BY stream, epoch")
        return {str(stream): (str(epoch), int(seq)) for stream, epoch, seq in rows}


def acknowledged(database: Path, upto: Heads) -> bool:
    """Tell whether a board has receipts for all rows up to and with ``upto``."""
    with _open(database) as store:
        acked = {
            (stream, epoch): seq for stream, epoch, seq in store.execute("SELECT stream, epoch, acked FROM stream")
        }
    return all(acked.get((stream, epoch), 0) >= seq for stream, (epoch, seq) in upto.items())


def compare(board: str, board_database: Path, controller_database: Path, upto: Heads) -> list[Comparison]:
    """Compare each stream's rows on the board, up to ``upto``, with those at the controller.

    The board goes on recording while this looks; ``upto`` says where to stop, whatever has its receipt.
    """
    return [
        _compare(board, stream, board_database, controller_database, epoch, last)
        for stream, (epoch, last) in sorted(upto.items())
    ]


def _compare(
    board: str, stream: str, board_database: Path, controller_database: Path, epoch: str, last: int
) -> Comparison:
    with _open(board_database) as store:
        sent: set[Key] = set(
            store.execute(
                "SELECT epoch, seq, hash FROM entry WHERE stream = ? AND epoch = ? AND seq <= ?", (stream, epoch, last)
            )
        )
    with _open(controller_database) as store:
        received: list[Key] = list(
            store.execute(
                "SELECT epoch, seq, hash FROM stream_row"
                " WHERE device_id = ? AND stream = ? AND (epoch <> ? OR seq <= ?)",
                (board, stream, epoch, last),
            )
        )
    return Comparison(
        board,
        stream,
        len(sent),
        len(received),
        len(received) - len({row_hash for _, _, row_hash in received}),
        len(sent - set(received)),
    )


def _open(database: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True))
