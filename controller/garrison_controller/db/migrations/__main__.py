"""Writes a new revision: the difference between the tables in the code and the newest schema."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command

from garrison_controller.db.migrations import configuration, upgrade


def main() -> None:
    """Autogenerate a revision named by the first argument against a scratch SQLite database."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'schema.db'}"
        upgrade(url)
        command.revision(configuration(url), message=sys.argv[1], autogenerate=True)


if __name__ == "__main__":
    main()
