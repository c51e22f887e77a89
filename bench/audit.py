"""How fast a board appends to its audit log, beside the same rows put straight into SQLite.

Both write the same table with the same indexes and pragmas (WAL, synchronous=FULL) on the same file system, so the
difference is what the journal adds: the chain, canonical JSON, and the stream's head.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from bench.result import Budget, Findings, Measure
from garrison_agent.adapters.database import Database
from garrison_agent.core.health import row
from garrison_agent.outbox.journal import SEGMENT_KIND, Journal
from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol import chain
from garrison_protocol.states import Stream

GROUPS = (1, 20, 200)
PAIRS = 31
BLOCK_ROWS = 400
"""Rows of one side before the other has its turn (at least two groups)."""
DEVICE = "edge-1"
EPOCH = "0123456789abcdef"
INSERT = "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
FACTS: dict[str, str | int | bool | None] = {"count": 1, "errors": 0}


def measure(folder: Path) -> Findings:
    """Return rows per second and their ratios; takes about half a minute."""
    folder.mkdir(parents=True)
    record = RequestRecord(
        kind="chat",
        ok=True,
        prompt_tokens=57,
        completion_tokens=128,
        ttft_ms=41.5,
        duration_ms=4290.2,
        tokens_per_s=30.1,
    )
    body = [row("smollm2", "smollm2-135m-instruct:1.0.0", record)]
    with closing(Database(folder / "agent.db")) as ours, closing(Database(folder / "raw.db")) as theirs:
        journal = Journal(ours, DEVICE, now_ms=lambda: time.time_ns() // 1_000_000)
        rows = _rows(body)

        def append(group: int) -> Callable[[], None]:
            def run() -> None:
                with ours.transaction():
                    for _ in range(group):
                        journal.append(Stream.AUDIT, SEGMENT_KIND, FACTS, body)

            return run

        def insert(group: int) -> Callable[[], None]:
            prepared = [next(rows) for _ in range(group)]

            def run() -> None:
                connection = theirs.connection
                connection.execute("BEGIN IMMEDIATE")
                for one in prepared:
                    connection.execute(INSERT, one)
                connection.execute("COMMIT")

            return run

        measures = tuple(_compare(group, append, insert) for group in GROUPS)
    size = sum(len(str(value)) for value in next(rows))
    return Findings(
        f"`Journal.append` of one kind of row ({SEGMENT_KIND}, {size} bytes) in transactions of n, beside"
        f" `execute(INSERT)` of finished rows of that kind into an equal table (SQLite {sqlite3.sqlite_version}, WAL,"
        f" synchronous=FULL); per pair the median transaction of each side, order turned each time, median of"
        f" {PAIRS} pairs. The second line of each is the CPU time that this process spent, which other work on the"
        " machine hardly touches",
        tuple(line for pair in measures for line in pair),
    )


def _compare(
    group: int, append: Callable[[int], Callable[[], None]], insert: Callable[[int], Callable[[], None]]
) -> tuple[Measure, Measure]:
    blocks = max(2, min(40, BLOCK_ROWS // group))
    wall: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    for number in range(PAIRS + 1):
        sides = [append, insert]
        found = {}
        for side in sides if number % 2 else reversed(sides):
            transactions = [side(group) for _ in range(blocks)]
            found[side] = _median_s(transactions)
        if number:
            wall.append((found[append][0], found[insert][0]))
            cpu.append((found[append][1], found[insert][1]))
    budget = Budget("≥ 0.5 x raw inserts", 0.5, at_least=True, of_ratio=True)
    return _line(f"{group} per transaction", group, wall, budget), _line(f"{group}, CPU only", group, cpu, None)


def _line(what: str, group: int, pairs: list[tuple[float, float]], budget: Budget | None) -> Measure:
    ratios = tuple(theirs / ours for ours, theirs in pairs)
    return Measure(
        what,
        group / statistics.median(ours for ours, _ in pairs),
        "rows/s",
        group / statistics.median(theirs for _, theirs in pairs),
        "raw inserts",
        statistics.median(ratios),
        budget,
        ratios,
    )


def _median_s(transactions: list[Callable[[], None]]) -> tuple[float, float]:
    """Return the median transaction's wall time and the mean transaction's CPU time, in seconds."""
    seconds = []
    cpu_began_s = time.process_time()
    for transaction in transactions:
        began_s = time.perf_counter()
        transaction()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds), (time.process_time() - cpu_began_s) / len(transactions)


def _rows(body: object) -> Iterator[tuple[str, str, int, str, str, str, str | None, str | None]]:
    """Yield the finished rows of a chain, as the journal would store them."""
    previous, seq = chain.genesis(DEVICE, Stream.AUDIT.value, EPOCH), 0
    while True:
        seq += 1
        entry = chain.build(
            device=DEVICE,
            epoch=EPOCH,
            seq=seq,
            time_ms=time.time_ns() // 1_000_000,
            kind=SEGMENT_KIND,
            previous=previous,
            facts=FACTS,
            body=body,
            salt=os.urandom(chain.SALT_BYTES),
        )
        previous = entry.hash
        yield (Stream.AUDIT.value, EPOCH, seq, SEGMENT_KIND, entry.hash, entry.header, entry.body, entry.salt)
