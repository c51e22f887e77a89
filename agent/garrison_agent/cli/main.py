"""The commands of ``garrison-agent`` and what each accepts.

Exit statuses: 0 done; 1 failed; 2 wrong usage or input; 4 not found; 5 conflict; 6 refused by trust; 7 not permitted;
8 unavailable, retry later; 9 not enough disk or memory; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from garrison_agent.cli.service import enroll, print_completion, run_agent
from garrison_protocol.errors import GarrisonError

Command: TypeAlias = Callable[[argparse.Namespace], int]

WAIT_S = 1800.0
"""How long ``import --wait`` waits unless told otherwise."""
_MODEL_NAME = "alias, package name, or <name>:<version>"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = build_parser().parse_args(argv)
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="garrison-agent",
        description="Runs signed AI models on this board and shows what they do.",
        epilog=_examples(
            "garrison-agent enroll STRING            join a fleet (once)",
            "garrison-agent status                   what serves, what is queued, what is wrong",
            "garrison-agent model info smollm2 --license",
            "garrison-agent doctor                   check this board and say what to fix",
            "garrison-agent --config ./agent.toml status -o json",
        )
        + "\n\nexit statuses:\n  0 done, 1 failed, 2 usage or input, 4 not found, 5 conflict, 6 refused by trust,\n"
        "  7 not permitted, 8 unavailable, 9 not enough disk or memory",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"garrison-agent {version('garrison')}")
    parser.set_defaults(config=None, output="table")
    _add_common(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_service(commands)
    _add_models(commands)
    _add_cache(commands)
    _add_stick(commands)
    _add_command(
        commands,
        "doctor",
        _late("doctor", "run_doctor"),
        "check configuration, keys, certificate, clock, disk, engines, and the running agent",
        ["garrison-agent doctor", "garrison-agent doctor -o json"],
        notes="Exit status 1 if a check failed. Works while the agent is down.",
    )
    completion = _add_command(
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


def _late(module: str, name: str) -> Command:
    """Return a command that is loaded when it runs: the agent itself keeps none of the others in memory."""

    def run(arguments: argparse.Namespace) -> int:
        command: Command = getattr(import_module(f"garrison_agent.cli.{module}"), name)
        return command(arguments)

    return run


def _add_service(commands: Any) -> None:
    _add_command(
        commands,
        "run",
        run_agent,
        "run the agent in the foreground (systemd does this)",
        ["garrison-agent run", "garrison-agent run --config ./agent.toml"],
    )
    enrolment = _add_command(
        commands,
        "enroll",
        enroll,
        "make this board's keys and join a fleet",
        [
            "garrison-agent enroll STRING",
            "garrison-agent enroll - < string.txt                 keeps it out of the process list",
            "garrison-agent enroll STRING --name edge-7           the name that it would like, of a batch",
            "garrison-agent enroll STRING --no-wait               an invitation: ask, and come back later",
            "garrison-agent enroll --offline --out request.json   no network: carry this to an operator",
            "garrison-agent enroll --response response.json --root-sha256 DIGEST",
        ],
        notes="An operator prints the string with: garrison device token create NAME (or --batch), or garrison device\n"
        "invite. Whatever ends it, the same command goes on with the same keys.",
    )
    enrolment.add_argument(
        "string", metavar="STRING", nargs="?", help="the enrolment string; - reads it from standard input"
    )
    enrolment.add_argument(
        "--name", metavar="NAME", default="", help="what the board would like to be called, where the string is open"
    )
    enrolment.add_argument(
        "--no-wait", action="store_true", help="with an invitation: do not wait for approval, end with status 8"
    )
    enrolment.add_argument("--offline", action="store_true", help="write a request for an operator, without a network")
    enrolment.add_argument("--out", metavar="FILE", type=Path, help="with --offline: where to write the request")
    enrolment.add_argument("--response", metavar="FILE", type=Path, help="what the operator sent back")
    enrolment.add_argument(
        "--root-sha256", metavar="DIGEST", help="with --response: the digest of the root, as an operator told it"
    )
    _add_command(
        commands,
        "status",
        _late("status", "show_status"),
        "show what serves, connection, registry, outbox, and memory",
        ["garrison-agent status", "garrison-agent status -o json | jq .outbox"],
    )


def _add_models(commands: Any) -> None:
    models = _add_group(commands, "model", "list, inspect, load, and unload models")
    _add_command(
        models,
        "list",
        _late("models", "list_models"),
        "list the models on this board",
        ["garrison-agent model list", "garrison-agent model list -o json"],
    )
    info = _add_command(
        models,
        "info",
        _late("models", "show_model"),
        "show one model: variant, runtime, size, limits, gate, license",
        ["garrison-agent model info smollm2", "garrison-agent model info smollm2 --license"],
    )
    info.add_argument("name", metavar="NAME", help=_MODEL_NAME)
    info.add_argument("--license", action="store_true", help="show only the license")
    load = _add_command(
        models,
        "load",
        _late("models", "load_model"),
        "load a model and wait until it serves",
        ["garrison-agent model load smollm2"],
    )
    load.add_argument("name", metavar="NAME", help=_MODEL_NAME)
    unload = _add_command(
        models,
        "unload",
        _late("models", "unload_model"),
        "end a model's process and free its memory; the next request loads it again",
        ["garrison-agent model unload smollm2"],
    )
    unload.add_argument("name", metavar="NAME", help=_MODEL_NAME)


def _add_cache(commands: Any) -> None:
    cache = _add_group(commands, "cache", "see and clear installed model files")
    _add_command(
        cache,
        "list",
        _late("cache", "list_cache"),
        "list installed packages and their size",
        ["garrison-agent cache list"],
    )
    _add_command(
        cache,
        "location",
        _late("cache", "show_location"),
        "print the folder that holds model files",
        ["garrison-agent cache location"],
    )
    remove = _add_command(
        cache,
        "remove",
        _late("cache", "remove_from_cache"),
        "delete an installed package that nothing uses",
        ["garrison-agent cache remove smollm2:1.0.0"],
    )
    remove.add_argument("name", metavar="NAME", help="package name, or <name>:<version>")


def _add_stick(commands: Any) -> None:
    taken = _add_command(
        commands,
        "import",
        _late("stick", "import_bundle"),
        "take in a bundle from a stick: metadata, desired state, models, receipts",
        ["garrison-agent import /media/stick", "garrison-agent import /media/stick --wait 600"],
        notes="Needs no network. Everything is verified as if the network had brought it; an older bundle changes "
        "nothing.\nExit status 6 if a part was refused, 1 if a model that was waited for does not serve.",
    )
    taken.add_argument("folder", metavar="DIR", type=Path, help="the folder that `garrison registry export` wrote")
    taken.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        nargs="?",
        const=WAIT_S,
        help=f"wait until the models serve or have failed, at most so long (default: {WAIT_S:.0f})",
    )
    sent = _add_command(
        commands,
        "export",
        _late("stick", "export_bundle"),
        "write what this board sends home to a stick: status, audit, telemetry, requests",
        ["garrison-agent export /media/stick"],
        notes="Take it to the controller: garrison registry import DIR",
    )
    sent.add_argument("folder", metavar="DIR", type=Path, help="a folder on the stick")


def _add_group(commands: Any, name: str, summary: str) -> Any:
    group = commands.add_parser(name, help=summary, description=_sentence(summary))
    return group.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _add_command(
    commands: Any, name: str, command: Command, summary: str, examples: Sequence[str], *, notes: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=_sentence(summary),
        epilog=(f"{notes}\n\n" if notes else "") + _examples(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser)
    parser.set_defaults(command=command)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
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


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."
