"""The ``garrison`` command: nouns, exit statuses, and the one place where errors become text."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from garrison_controller.cli import access, audit, device, model, registry, rollout, serve
from garrison_controller.cli.output import print_error
from garrison_protocol.errors import GarrisonError

EXIT_STATUSES = """\
Exit statuses: 0 done; 1 unexpected failure; 2 wrong usage or input; 4 not found; 5 does not fit the current state; \
6 trust refused (signature, digest, identity); 7 not allowed or not logged in; 8 unreachable or busy, try again; \
9 not enough disk or memory.

Environment: GARRISON_URL, GARRISON_TOKEN and GARRISON_CA override what `garrison access login` stored.
"""

app = typer.Typer(
    name="garrison",
    help="Manage a fleet: its boards, models, rollouts, rights, and its audit.",
    epilog=EXIT_STATUSES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(access.app, name="access")
app.add_typer(audit.app, name="audit")
app.add_typer(device.app, name="device")
app.add_typer(model.app, name="model")
app.add_typer(registry.app, name="registry")
app.add_typer(rollout.app, name="rollout")
app.add_typer(serve.app, name="serve")


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
