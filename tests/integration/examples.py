"""The examples of docs/local-api.md: commands, the answers that the page promises, and whether an answer keeps it.

How the page writes answers, shortened (it says so itself): a text with ``...`` stands for any text there; a number with
an exponent for any number; what an object does not show may be there all the same; a list that ends in ``"..."`` may go
on. Everything else is literal.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.curl import Answer, Curl, parse_curl

PAGE = Path(__file__).resolve().parents[2] / "docs" / "local-api.md"
ELLIPSIS = "..."
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MAKES_FILES = ("printf ", "head ")


class _Any(float):
    """A number that the page gives with an exponent: any number."""


@dataclass(frozen=True)
class Example:
    """``makes``: shell lines that make the files which the request sends. ``kind`` of the answer: its block's word."""

    line: int
    makes: tuple[str, ...]
    command: str
    kind: str
    answer: str

    def parse(self, names: dict[str, str] | None = None) -> Curl:
        """Return the command with ``$NAME`` replaced by what ``names`` has for it."""
        words = shlex.split(self.command)
        for name, value in (names or {}).items():
            words = [word.replace(f"${name.upper()}", value) for word in words]
        return parse_curl(words)


def read_examples(text: str) -> Iterator[Example]:
    """Yield every example in page order; each needs an answer: the next block.

    Raises:
        AssertionError: A block with a curl command is not an example.
    """
    blocks = [(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in _BLOCK.finditer(text)]
    for at, (kind, body, line) in enumerate(blocks):
        lines = body.replace("\\\n", " ").splitlines()
        if kind != "sh" or not any("curl" in one for one in lines):
            continue
        starts = [place for place, one in enumerate(lines) if one.startswith("curl ")]
        assert len(starts) == 1, f"line {line}: a block has one curl command, at its end"
        makes, command = lines[: starts[0]], "\n".join(lines[starts[0] :])
        assert all(one.startswith(_MAKES_FILES) for one in makes), f"line {line}: only printf and head may come before"
        assert at + 1 < len(blocks), f"line {line}: no answer follows"
        assert blocks[at + 1][0] in ("json", "text", "http"), f"line {line}: its answer does not follow"
        yield Example(line, tuple(makes), command, blocks[at + 1][0], blocks[at + 1][1])


def check_answer(example: Example, answer: Answer) -> None:
    """Hold what came against what the page promises.

    Raises:
        AssertionError: It says what differs.
    """
    expected = example.answer
    if example.kind == "http":
        head, _, expected = expected.partition("\n\n")
        first, *headers = head.strip().splitlines()
        assert answer.line == first, answer.body[:300]
        for header in headers:
            name, _, value = header.partition(": ")
            check_value(value, answer.headers.get(name.lower()), name)
    else:
        assert answer.status == 200, (answer.line, answer.body[:300])
    if example.kind == "text":
        assert matches_text(expected.strip(), answer.body.decode().strip()), answer.body.decode()[:2000]
    elif expected.strip():
        assert answer.headers["content-type"] == "application/json"
        check_value(json.loads(expected, parse_float=_number), json.loads(answer.body))
    else:
        assert answer.body == b""


def _number(text: str) -> float:
    return _Any(text) if "e" in text.lower() else float(text)


def check_value(expected: Any, found: Any, where: str = "$") -> None:
    """Hold a value against the page's.

    Raises:
        AssertionError: It says where they differ.
    """
    match expected:
        case _Any():
            good = isinstance(found, int | float) and not isinstance(found, bool)
            assert good, f"{where}: a number is promised, {found!r} came"
        case dict():
            assert isinstance(found, dict), f"{where}: {found!r} is no object"
            for key, value in expected.items():
                assert key in found, f"{where}: no {key!r} among {sorted(found)}"
                check_value(value, found[key], f"{where}.{key}")
        case list():
            assert isinstance(found, list), f"{where}: {found!r} is no list"
            shown = expected[:-1] if expected[-1:] == [ELLIPSIS] else expected
            assert len(found) >= len(shown), f"{where}: only {len(found)} items"
            assert shown is not expected or len(found) == len(shown), f"{where}: {len(found)} items"
            for at, (one, other) in enumerate(zip(shown, found, strict=False)):
                check_value(one, other, f"{where}[{at}]")
        case str() if ELLIPSIS in expected:
            assert isinstance(found, str), f"{where}: {found!r} is no text"
            assert matches_text(expected, found), f"{where}: {found!r} is not {expected!r}"
        case _:
            same = type(expected) is type(found) and expected == found
            assert same, f"{where}: {expected!r} is promised, {found!r} came"


def matches_text(pattern: str, text: str) -> bool:
    """Tell whether ``text`` is ``pattern``, with any text in place of each ``...``."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split(ELLIPSIS))), text, re.DOTALL) is not None
