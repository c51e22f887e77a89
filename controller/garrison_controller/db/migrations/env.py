"""Alembic's entry: runs migrations on the URL that ``upgrade`` or the developer gave."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext

from garrison_controller.db.base import Database, UtcDateTime
from garrison_controller.db.tables import metadata


def _render(kind: str, item: Any, _context: AutogenContext) -> str | Literal[False]:
    # Migrations must not change when application code moves: they name SQLAlchemy's type only.
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def _run() -> None:
    url = context.config.get_main_option("sqlalchemy.url")
    assert url is not None
    database = Database(url)
    try:
        with database.engine.connect() as connection:
            context.configure(
                connection=connection,
                target_metadata=metadata,
                render_as_batch=database.sqlite,
                render_item=_render,
                transaction_per_migration=False,
            )
            with context.begin_transaction():
                context.run_migrations()
            connection.commit()
    finally:
        database.close()


_run()
