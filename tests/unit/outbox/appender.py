"""Appends to a journal for ever and prints each number once its append returned; the test kills it at any point."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from garrison_agent.adapters.database import Database
from garrison_agent.outbox.journal import Journal
from garrison_protocol.states import Stream


def main() -> None:
    database = Database(Path(sys.argv[1]))
    journal = Journal(database, "edge-1", now_ms=lambda: time.time_ns() // 1_000_000)
    number = 0
    while True:
        number += 1
        if number % 3:
            rows = [(Stream.AUDIT, journal.append(Stream.AUDIT, "model.loaded", {"nr": number}, {"text": "x" * 300}))]
        else:
            with database.transaction():
                rows = [(Stream.TELEMETRY, journal.append(Stream.TELEMETRY, "sample", {"nr": number}))]
                rows += [(Stream.AUDIT, journal.append(Stream.AUDIT, "group", {"nr": row})) for row in range(8)]
        for stream, entry in rows:
            print(stream.value, entry.seq, entry.hash)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
