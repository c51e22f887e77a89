from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from garrison_agent.adapters.database import Database
from garrison_agent.outbox.journal import Journal

DEVICE = "edge-1"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "agent.db")
    yield database
    database.close()


@pytest.fixture
def journal(database: Database) -> Journal:
    return Journal(database, DEVICE, now_ms=lambda: 1_700_000_000_000)
