"""The commands of ``garrison-agent``.

Exit statuses: 0 done; 1 failed; 2 wrong usage or input; 4 not found; 5 conflict; 6 refused by trust; 7 not permitted;
8 unavailable, retry later; 9 not enough disk or memory; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

from garrison_agent.cli.parsers import apps, board, models, stick
from garrison_agent.cli.parsers.declare import add_command, add_common, examples
from garrison_agent.cli.service import print_completion
from garrison_protocol.errors import GarrisonError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parse(argv)
    try:
        status: int = arguments.command(arguments)
        sys.stdout.flush()
    except GarrisonError as error:
        from garrison_agent.cli.output import print_error

        print_error(error, arguments.output)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments; a prompt's words may also stand behind options, which argparse leaves over."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    words: list[str] | None = getattr(arguments, "words", None)
    if words is not None and not any(word.startswith("-") for word in rest):
        words += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="garrison-agent",
        description="Runs signed AI models on this board and shows what they do.",
        epilog=examples(
            "garrison-agent enroll STRING            join a fleet (once)",
            "garrison-agent status                   what serves, queues, and is wrong",
            "garrison-agent run smollm2              talk to a model",
            "garrison-agent model info smollm2 --variants",
            "garrison-agent doctor                   check this board and say what to fix",
            "garrison-agent --config ./agent.toml status -o json",
        )
        + "\n\nexit statuses:\n  0 done, 1 failed, 2 usage or input, 4 not found, 5 conflict, 6 trust refused,\n"
        "  7 not permitted, 8 unavailable, 9 not enough disk or memory",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"garrison-agent {version('garrison')}")
    parser.set_defaults(config=None, output="table")
    add_common(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (board, models, apps, stick):
        group.add_to(commands)
    completion = add_command(
        commands,
        "completion",
        partial(print_completion, parser=parser),
        "print a shell's completion script",
        [
            "garrison-agent completion bash > /etc/bash_completion.d/garrison-agent",
            "garrison-agent completion zsh > /usr/share/zsh/site-functions/_garrison-agent",
        ],
    )
    completion.add_argument("shell", choices=["bash", "zsh"])
    return parser
