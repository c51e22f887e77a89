"""The ``garrison`` command: nouns, exit statuses, and the one place where errors become text."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from garrison_controller.cli.output import print_error
from garrison_protocol.errors import GarrisonError

EXIT_STATUSES = """\
Exit statuses: 0 done; 1 unexpected failure; 2 wrong usage or input; 4 not found; 5 does not fit the current state; \
6 trust refused (signature, digest, identity); 7 not allowed or not logged in; 8 unreachable or busy, try again; \
9 not enough disk or memory.

Environment: GARRISON_URL, GARRISON_TOKEN and GARRISON_CA override what `garrison access login` stored.
"""

NOUNS = ("access", "audit", "device", "model", "registry", "rollout", "serve")


class _Nouns(TyperGroup):
    """Imports a noun's module only when that noun is used: listing boards needs no web server and no database."""

    @override
    def list_commands(self, ctx: Any) -> list[str]:
        return list(NOUNS)

    @override
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in NOUNS:
            return None
        command = typer.main.get_command(importlib.import_module(f"garrison_controller.cli.{cmd_name}").app)
        command.name = cmd_name
        return command


app = typer.Typer(
    name="garrison",
    cls=_Nouns,
    help="Manage a fleet: its boards, models, rollouts, rights, and its audit.",
    epilog=EXIT_STATUSES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def garrison() -> None:
    """Manage a fleet: its boards, models, rollouts, rights, and its audit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``arguments`` default to those of the process."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="garrison")
    except GarrisonError as error:
        return print_error(error)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0
