"""The schema's history (Alembic) and the way to bring a database to its end.

``upgrade`` needs no ``alembic.ini``. To write a revision after changing tables::

    python -m garrison_controller.db.migrations "what changes"
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

FOLDER = Path(__file__).parent


def configuration(url: str) -> Config:
    """Return Alembic's configuration for the database at ``url``."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(url: str) -> None:
    """Bring the database at ``url`` to the newest schema; one that has it already is left alone."""
    command.upgrade(configuration(url), "head")
