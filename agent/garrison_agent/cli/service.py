"""``garrison-agent run`` and ``enroll``, and the shell completion."""

from __future__ import annotations

import argparse

from garrison_agent.config import load_config
from garrison_protocol.errors import GarrisonError, UnavailableError

_OURS = ("garrison_agent", "garrison_protocol")


def run_agent(arguments: argparse.Namespace) -> int:
    """Run the agent in the foreground until SIGTERM or SIGINT."""
    config = load_config(arguments.config)
    try:
        from garrison_agent import wiring
    except ModuleNotFoundError as error:
        raise _extra_missing(error) from error
    return wiring.run_agent(config)


def enroll(arguments: argparse.Namespace) -> int:
    """Make this board's keys and have the controller admit it."""
    try:
        from garrison_agent.cli import enrolment

        return enrolment.enroll(arguments)
    except ModuleNotFoundError as error:
        raise _extra_missing(error) from error


def print_completion(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the completion script of a shell."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "cli.extra_missing", "shell completion needs the package shtab", hint="pip install shtab"
        ) from error
    print(shtab.complete(parser, arguments.shell))
    return 0


def _extra_missing(error: ModuleNotFoundError) -> GarrisonError:
    """Return what to install when a library is missing; a missing module of our own is a bug and stays one."""
    missing = (error.name or "").partition(".")[0]
    if missing in _OURS:
        raise error
    return UnavailableError(
        "cli.extra_missing", f"the Python package {missing} is not installed", hint="pip install 'garrison[agent]'"
    )
