"""Entry of the ``garrison`` command."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("alembic", "apscheduler", "fastapi", "httpx", "rich", "sqlalchemy", "tuf", "typer")


def main() -> int:
    """Run the command line, or say which extra is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"error: not installed: {', '.join(missing)}\n")
        sys.stderr.write("hint: pip install 'garrison[controller]'\n")
        return 1
    from garrison_controller.cli.app import main as run  # noqa: PLC0415 -- after the check above

    return run()


if __name__ == "__main__":
    sys.exit(main())
