from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from pathlib import Path

from garrison_agent.adapters.database import Database
from garrison_agent.outbox.journal import Journal
from garrison_protocol import chain

KILLS = 20
APPENDER = Path(__file__).with_name("appender.py")


def test_no_append_that_returned_is_lost_by_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    chance = random.Random(4)
    printed: set[tuple[str, int, str]] = set()
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, str(APPENDER), str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(chance.randint(1, 60))]
        process.kill()
        with process.stdout:
            rest = process.stdout.read()
        process.wait(30)
        whole = (rest if rest.endswith("\n") else rest.rpartition("\n")[0]).splitlines()
        for line in [*lines, *whole]:
            stream, seq, digest = line.split()
            printed.add((stream, int(seq), digest))

    reader = sqlite3.connect(path)
    rows = reader.execute(
        "SELECT stream, epoch, seq, hash, header, body, salt FROM entry ORDER BY stream, seq"
    ).fetchall()
    reader.close()
    assert len(printed) > 10 * KILLS
    assert printed <= {(stream, seq, digest) for stream, _, seq, digest, *_ in rows}
    previous = None
    expected = {"audit": 0, "telemetry": 0}
    for stream, epoch, seq, digest, header, body, salt in rows:
        expected[stream] += 1
        link = (previous or chain.genesis("edge-1", "audit", epoch)) if stream == "audit" else None
        entry = chain.Entry(seq, digest, header, body, salt)
        assert chain.check(entry, device="edge-1", epoch=epoch, seq=expected[stream], previous=link) is None
        previous = digest if stream == "audit" else previous
    assert len({epoch for _, epoch, *_ in rows}) == 1

    database = Database(path)
    heads = Journal(database, "edge-1", now_ms=lambda: 0).heads()
    database.close()
    assert {stream: head.seq for stream, head in heads.items()} == expected
