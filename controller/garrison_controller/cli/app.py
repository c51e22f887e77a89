"""The ``garrison`` command: nouns, exit statuses, and the one place where errors become text."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from garrison_controller.cli.output import print_error
from garrison_protocol.errors import GarrisonError, InsufficientError, InvalidError

EXIT_STATUSES = """\
Exit statuses: 0 done; 1 unexpected failure; 2 wrong usage or input; 4 not found; 5 does not fit the current state; \
6 trust refused (signature, digest, identity); 7 not allowed or not logged in; 8 unreachable or busy, try again; \
9 not enough disk or memory; 130 interrupted.

Environment: GARRISON_URL, GARRISON_TOKEN and GARRISON_CA override what `garrison access login` stored; \
GARRISON_KEY_PASSPHRASE opens a signer's key.

Examples: garrison access login --url https://fleet.example:8443 --ca server-ca.pem

garrison device list

garrison rollout show smol-1 -o json

garrison audit verify
"""

INTERRUPTED = 130
NOUNS = ("access", "audit", "broker", "device", "model", "registry", "rollout", "serve")


class _Nouns(TyperGroup):
    """Imports a noun's module only when that noun is used: listing boards needs no web server and no database."""

    @override
    def list_commands(self, ctx: Any) -> list[str]:
        return list(NOUNS)

    @override
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in NOUNS:
            return None
        noun = importlib.import_module(f"garrison_controller.cli.{cmd_name}").app
        noun._add_completion = False  # the options that install completion belong to `garrison` alone
        command = typer.main.get_command(noun)
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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"garrison {version('garrison')}")
        raise typer.Exit


@app.callback()
def garrison(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Manage a fleet: its boards, models, rollouts, rights, and its audit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``arguments`` default to those of the process."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="garrison")
    except GarrisonError as error:
        return print_error(error)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            sys.stderr.write("interrupted; run the same command again\n")
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:  # of a copy, the second name is where it went; of a write there is none
            where = f" for {error.filename2 or error.filename}" if error.filename else ""
            full = InsufficientError("cli.disk_full", f"no space left{where}", hint="free space, then run it again")
            return print_error(full)
        if error.filename is None:
            raise
        what = f"cannot use {error.filename}: {error.strerror}"
        return print_error(InvalidError("cli.file_unusable", what, hint="check the path and who may read or write it"))
    return 0
