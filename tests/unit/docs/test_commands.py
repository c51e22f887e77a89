"""What README.md and docs/ tell people to type exists: commands, options, configuration keys, links, headings."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup
from typer.main import get_command

from garrison_agent.cli.main import build_parser
from garrison_agent.config import AgentConfig
from garrison_controller.cli.app import app
from garrison_controller.config import ControllerConfig

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`(garrison(?:-agent)? [^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAMS = ("garrison", "garrison-agent")
ENDS = {"|", "<", ">", "&", "&&", ";"}


@dataclass(frozen=True)
class Known:
    """A command line that exists: which subcommands follow, or, for the last one, which options it takes."""

    commands: dict[str, Known]
    options: frozenset[str]
    required: frozenset[str] = frozenset()


def of_typer(command: Any) -> Known:
    if isinstance(command, TyperGroup):
        context = command.make_context(None, [], resilient_parsing=True)
        found = {name: command.get_command(context, name) for name in command.list_commands(context)}
        return Known({name: of_typer(one) for name, one in found.items()}, frozenset({"--help"}))
    taken = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    options = {name for parameter in taken for name in (*parameter.opts, *parameter.secondary_opts)}
    required = {parameter.opts[0] for parameter in taken if parameter.required}
    return Known({}, frozenset({"--help", *options}), frozenset(required))


def of_argparse(parser: argparse.ArgumentParser) -> Known:
    commands: dict[str, Known] = {}
    options: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = {name: of_argparse(one) for name, one in action.choices.items()}
        options.update(action.option_strings)
    return Known(commands, frozenset(options))


CLIS = {"garrison": of_typer(get_command(app)), "garrison-agent": of_argparse(build_parser())}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    for indent, language, body in BLOCK.findall(text):
        yield language, "\n".join(line.removeprefix(indent) for line in body.splitlines())


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the words, from the program on, of each of our commands in the page's shell blocks."""
    for language, body in blocks(text):
        if language != "sh":
            continue
        for words in shell_lines(body):
            for place, word in enumerate(words):
                if Path(word).name in PROGRAMS and starts_command(words[:place]):
                    yield [Path(word).name, *until_end(words[place + 1 :])]


def shell_lines(body: str) -> Iterator[list[str]]:
    """Yield the words of each line; a quoted text may go on over several."""
    line = ""
    for part in body.replace("\\\n", " ").splitlines(keepends=True):
        line += part
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        line = ""
        yield words
    assert not line, f"a quote is never closed: {line}"


def starts_command(before: Sequence[str]) -> bool:
    return not before or before[-1] in {*ENDS, "sudo"} or (before[0] == "runuser" and before[-1] == "--")


def until_end(words: Sequence[str]) -> list[str]:
    ends = [place for place, word in enumerate(words) if word in ENDS]
    return list(words[: ends[0]] if ends else words)


def fault(words: Sequence[str], *, whole: bool) -> str:
    """Return what is wrong with a command line, or nothing. ``whole``: a command, not just words about one."""
    known = CLIS[words[0]]
    rest = list(words[1:])
    while rest and known.commands and not rest[0].startswith("-"):
        if rest[0] not in known.commands:
            return f"no command {rest[0]!r}"
        known = known.commands[rest.pop(0)]
    if whole and known.commands:
        return "no whole command"
    given = set()
    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("-") and name != "-":
            given.add(name)
            if name not in known.options:
                return f"no option {name!r}"
    missing = known.required - given
    return f"lacks {sorted(missing)}" if whole and missing else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_blocks_exist(page: Path) -> None:
    faults = {" ".join(words): fault(words, whole=True) for words in command_lines(page.read_text(encoding="utf-8"))}
    assert {line: what for line, what in faults.items() if what} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist(page: Path) -> None:
    spans = SPAN.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))
    faults = {span: fault(shlex.split(span), whole=False) for span in spans}
    assert {line: what for line, what in faults.items() if what} == {}


def test_the_check_sees_commands_and_their_faults() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert len(list(command_lines(text))) > 25
    assert fault(["garrison", "device", "list", "--nope"], whole=True) == "no option '--nope'"
    assert fault(["garrison", "device", "lst"], whole=True) == "no command 'lst'"
    assert fault(["garrison", "registry", "push"], whole=True) == "lacks ['--workspace']"
    assert fault(["garrison-agent", "cache"], whole=True) == "no whole command"


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted keys and defaults of a configuration."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.default


def shown(default: object) -> str:
    """Return a default as the tables of operations.md show it."""
    if default is PydanticUndefined:
        return "required"
    match default:
        case None:
            return "none"
        case ():
            return "`[]`"
        case str() | Path():
            return f'`"{default}"`'
        case int() | float():
            return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
    raise AssertionError(default)


@pytest.mark.parametrize(
    ("heading", "model"), [("Agent configuration", AgentConfig), ("Controller configuration", ControllerConfig)]
)
def test_settings_are_documented_with_their_defaults(heading: str, model: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `([a-z_.]+)` \| (\S+) \| ", section, re.MULTILINE))
    assert documented == {key: shown(default) for key, default in fields(model)}


def anchors(page: Path) -> set[str]:
    """Return the fragments that a page's headings have on the usual forges."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(re.sub(r"`[^`]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))):
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link or (target.is_file() and not fragment) or target.is_dir():
            continue
        if not target.is_file() or fragment not in anchors(target):
            broken.append(link)
    assert broken == []
