"""docs/errors.md lists exactly the error codes of the shipped code, found in its syntax trees."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CODE = re.compile(r"[a-z]+(\.[a-z][a-z0-9_]*)+")
ROW = re.compile(r"\| `([a-z]+\.[a-z0-9_]+)` \| ([^|]+) \| ([^|]+) \|")
CARRIERS = {
    "Failed": 0,
    "JobFailed": 1,
    "MustWait": 2,
    "Unsuitable": 1,
    "kind": 0,  # a class chosen by HTTP status
    "raise_alarm": 2,
    "_fail": 2,
    "_never_started": 0,
    "_roll_back": 1,
    "_token_refused": 0,
    "_wrong": 0,
}
"""Functions and events, besides classes called ``...Error``, that get a code, and at which place."""
PREFIXES = ("gate.", "stream.")
"""Every string beginning so is a code, wherever it stands."""


def strings(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and CODE.fullmatch(inner.value):
            yield inner.value


def codes_of_call(call: ast.Call) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name.endswith("Error"):
        for argument in call.args[:2]:  # the second place is the code of ApiError(status, code, ...)
            if isinstance(argument, ast.Constant | ast.IfExp):
                yield from strings(argument)
    elif name in CARRIERS and len(call.args) > CARRIERS[name]:
        yield from strings(call.args[CARRIERS[name]])
    elif name == "_refuse" and call.args and isinstance(call.args[0], ast.Constant):
        yield f"oip.{call.args[0].value!s}"  # runtimes/tensors/oip.py adds the first part itself
    elif name == "_refuse" and len(call.args) > 1:
        yield from strings(call.args[1])


def codes_of_assignment(node: ast.Assign) -> Iterator[str]:
    """Yield what is assigned to a variable or an attribute that holds a code."""
    names = {getattr(target, "id", getattr(target, "attr", "")) for target in node.targets}
    if names & {"code", "error_code", "CLIENT_GONE", "NOT_ANCHORED", "SUPERSEDED"}:
        yield from strings(node.value)


def scan() -> tuple[set[str], set[str]]:
    """Return the codes that something raises or reports, and every string that looks like a code."""
    raised: set[str] = set()
    known: set[str] = set()
    for path in sorted(path for part in ("protocol", "agent", "controller") for path in (ROOT / part).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known |= set(strings(tree))
        raised |= {text for text in strings(tree) if text.startswith(PREFIXES)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                raised |= set(codes_of_call(node))
            elif isinstance(node, ast.Assign):
                raised |= set(codes_of_assignment(node))
    return raised, known | raised


def documented() -> list[tuple[str, str, str]]:
    return ROW.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))


def test_every_code_is_documented_once() -> None:
    raised, _ = scan()
    assert len(raised) > 250  # the scan still finds them
    listed = Counter(code for code, _, _ in documented())
    assert sorted(raised - set(listed)) == []
    assert [code for code, times in listed.items() if times > 1] == []


def test_every_documented_code_exists() -> None:
    _, known = scan()
    assert sorted({code for code, _, _ in documented()} - known) == []


def test_every_code_has_a_meaning_and_an_advice() -> None:
    assert [code for code, meaning, advice in documented() if len(meaning) < 10 or len(advice) < 4] == []
