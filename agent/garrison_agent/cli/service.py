"""``garrison-agent run`` and ``enroll``, and the shell completion."""

from __future__ import annotations

import argparse

from garrison_agent.config import load_config
from garrison_protocol.errors import GarrisonError, InvalidError, UnavailableError

_CHAT_OPTIONS = (
    "system",
    "temperature",
    "top_p",
    "seed",
    "max_tokens",
    "json_schema",
    "keep_alive",
    "verbose",
)
_OURS = ("garrison_agent", "garrison_protocol")
COMPLETION_PREAMBLE: dict[str, str] = {
    "bash": """_garrison_agent_models() {
  compgen -W "$(garrison-agent model list 2>/dev/null | awk 'NR > 1 {print $1}')" -- "$1"
}""",
    "zsh": """_garrison_agent_models() {
  local -a names
  names=(${(f)"$(garrison-agent model list 2>/dev/null | awk 'NR > 1 {print $1}')"})
  compadd -a names
}""",
}
"""Shell functions that complete the names of models: the first column of the list."""


def run(arguments: argparse.Namespace) -> int:
    """Talk to the model that was named, or else run the agent itself."""
    if arguments.name is None:
        given = [name for name in _CHAT_OPTIONS if getattr(arguments, name)]
        if given:
            raise InvalidError(
                "cli.model_missing",
                f"--{given[0].replace('_', '-')} needs the name of a model",
                hint="garrison-agent run NAME talks to a model; without a name it runs the agent itself",
            )
        return run_agent(arguments)
    from garrison_agent.cli.chat import run_model

    return run_model(arguments)


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
    print(shtab.complete(parser, arguments.shell, preamble=COMPLETION_PREAMBLE[arguments.shell]))
    return 0


def _extra_missing(error: ModuleNotFoundError) -> GarrisonError:
    """Return what to install when a library is missing; a missing module of our own is a bug and stays one."""
    missing = (error.name or "").partition(".")[0]
    if missing in _OURS:
        raise error
    return UnavailableError(
        "cli.extra_missing", f"the Python package {missing} is not installed", hint="pip install 'garrison[agent]'"
    )
