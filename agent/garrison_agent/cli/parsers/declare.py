"""How a command is declared: its parser, its help with examples, and the function that runs it."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

Command: TypeAlias = Callable[[argparse.Namespace], int]
"""Runs with the parsed arguments and returns the exit status."""

_WIDTH = 80
MODEL_NAME = "alias, package name, or <name>:<version>"
COMPLETE_MODELS = {"bash": "_garrison_agent_models", "zsh": "_garrison_agent_models"}
"""Shell functions (``service.COMPLETION_PREAMBLE``) that offer the names of this board's models."""


def late(module: str, name: str) -> Command:
    """Return a command that is loaded when it runs: the agent itself keeps none of the others in memory."""

    def run(arguments: argparse.Namespace) -> int:
        command: Command = getattr(import_module(f"garrison_agent.cli.{module}"), name)
        return command(arguments)

    return run


def add_group(commands: Any, name: str, summary: str) -> Any:
    """Add ``name`` as a word that further commands follow, and return where to add those."""
    group = commands.add_parser(name, help=summary, description=sentence(summary))
    return group.add_subparsers(title="commands", metavar="COMMAND", required=True)


def add_command(
    commands: Any, name: str, command: Command, summary: str, lines: Sequence[str], *, notes: str = ""
) -> argparse.ArgumentParser:
    """Add one command with its common options, and return its parser. ``lines`` are examples to type."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(sentence(summary), _WIDTH),
        epilog=(f"{textwrap.fill(' '.join(notes.split()), _WIDTH)}\n\n" if notes else "") + examples(*lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    parser.set_defaults(command=command)
    return parser


def add_model_name(parser: argparse.ArgumentParser, *, nargs: str | None = None, text: str = MODEL_NAME) -> None:
    """Add the positional NAME of a model, which shells complete."""
    given: dict[str, Any] = {} if nargs is None else {"nargs": nargs}
    action: Any = parser.add_argument("name", metavar="NAME", help=text, **given)
    action.complete = COMPLETE_MODELS


def add_common(parser: argparse.ArgumentParser) -> None:
    """Accept the common options before and after the command; only those given are set."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=argparse.SUPPRESS,
        help="configuration file (default: /etc/garrison/agent.toml)",
    )
    parser.add_argument(
        "-o", "--output", choices=["table", "json"], default=argparse.SUPPRESS, help="what to print (default: table)"
    )


def examples(*lines: str) -> str:
    """Return ``lines`` as the block of examples that ends a help text; a remark that is too far right gets a line."""
    return "examples:\n" + "\n".join(_example(f"  {line}") for line in lines)


def _example(line: str) -> str:
    command, gap, remark = line[2:].partition("  ")
    return f"  {command}\n      {remark.strip()}" if gap and len(line) > _WIDTH else line


def sentence(summary: str) -> str:
    """Return ``summary`` with a capital letter and a full stop."""
    return f"{summary[0].upper()}{summary[1:]}."
