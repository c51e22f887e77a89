"""The migrations lead to exactly the tables, constraints and triggers that the code declares."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from garrison_controller.db.base import Database
from garrison_controller.db.migrations import upgrade
from garrison_controller.db.tables import metadata

pytestmark = pytest.mark.integration


def objects(path: Path, kind: str) -> dict[str, str]:
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = ?", (kind,)).fetchall()
    finally:
        connection.close()
    return {name: " ".join((sql or "").split()) for name, sql in rows if name != "alembic_version"}


def test_migrations_and_tables_agree(tmp_path: Path) -> None:
    migrated, declared = tmp_path / "migrated.db", tmp_path / "declared.db"
    upgrade(f"sqlite:///{migrated}")
    database = Database(f"sqlite:///{migrated}")
    try:
        with database.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    finally:
        database.close()
    fresh = Database(f"sqlite:///{declared}")
    fresh.create_all()
    fresh.close()
    assert objects(migrated, "trigger") == objects(declared, "trigger")
    assert objects(migrated, "table").keys() == objects(declared, "table").keys()
    for table, sql in objects(declared, "table").items():
        assert sql.count("CHECK") == objects(migrated, "table")[table].count("CHECK"), table


def test_upgrading_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "twice.db"
    upgrade(f"sqlite:///{path}")
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO principal (id, name, kind, created_at) VALUES ('1', 'alice', 'person', '2026-11-24 00:00:00')"
    )
    connection.commit()
    upgrade(f"sqlite:///{path}")
    assert connection.execute("SELECT name FROM principal").fetchall() == [("alice",)]
    connection.close()
