"""``garrison-agent logs``: the agent's part of the journal."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from garrison_protocol.errors import NotFoundError

_UNIT = "garrison-agent"
_LINES = 50
_RUNNING = Path("/run/systemd/system")


def show_logs(arguments: argparse.Namespace) -> int:
    """Print what the agent logged; JSON is one object per line, as journalctl has it.

    Raises:
        NotFoundError: ``cli.no_journal``; the agent is no service of systemd here.
    """
    _require_unit()
    return subprocess.run(journal_command(arguments), check=False).returncode


def journal_command(arguments: argparse.Namespace) -> list[str]:
    """Return the journalctl command that shows what was asked for."""
    words = ["journalctl", "--unit", _UNIT, "--no-pager"]
    if arguments.output == "json":
        words += ["--output", "json"]
    if arguments.since is not None:
        words += [f"--since={arguments.since}"]
    if arguments.lines is not None or arguments.since is None:
        words += [f"--lines={_LINES if arguments.lines is None else arguments.lines}"]
    return [*words, *(["--follow"] if arguments.follow else [])]


def _require_unit() -> None:
    if _RUNNING.is_dir() and shutil.which("journalctl") and shutil.which("systemctl"):
        found = subprocess.run(["systemctl", "cat", _UNIT], check=False, capture_output=True)
        if found.returncode == 0:
            return
    raise NotFoundError(
        "cli.no_journal",
        f"systemd runs no {_UNIT} here, so there is no journal of it",
        hint="an agent that was started by hand logs to its own terminal, or where that was redirected",
    )
