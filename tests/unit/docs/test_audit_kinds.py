"""docs/protocol.md lists exactly the kinds of audit entries that the agent writes, found in its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from garrison_agent.core.health import row
from garrison_agent.runtimes.status import RequestRecord

ROOT = Path(__file__).resolve().parents[3]
SECTION = (ROOT / "docs" / "protocol.md").read_text().partition("### Kinds of audit entries")[2].partition("\n## ")[0]
KIND = re.compile(r"[a-z]+\.[a-z_]+")
STEPS = "deployment.<state>"


def listed() -> set[str]:
    cells = [line.split("|")[1] for line in SECTION.splitlines() if line.startswith("| `")]
    return {kind for cell in cells for kind in re.findall(r"`([^`]+)`", cell)}


def of_entry(call: ast.Call) -> ast.expr | None:
    """Return the argument that is a kind, where ``call`` writes an audit entry."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name == "append" and len(call.args) > 2 and ast.unparse(call.args[0]) == "Stream.AUDIT":
        return call.args[1]
    if name == "note" and call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr):
        return call.args[0]
    if name == "_record" and len(call.args) == 3:
        return call.args[1]
    return None


def written() -> Iterator[str]:
    for path in (ROOT / "agent" / "garrison_agent").rglob("*.py"):
        tree = ast.parse(path.read_text())
        values: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    values.setdefault(getattr(target, "id", ""), []).append(node.value)
        for node in ast.walk(tree):
            kind = of_entry(node) if isinstance(node, ast.Call) else None
            if isinstance(kind, ast.JoinedStr):
                yield STEPS
                continue
            for value in values.get(kind.id, []) if isinstance(kind, ast.Name) else [] if kind is None else [kind]:
                for inner in ast.walk(value):
                    if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and KIND.fullmatch(inner.value):
                        yield inner.value


def test_every_kind_that_is_written_is_listed_and_no_other() -> None:
    found = set(written()) | {"inference.segment"}  # its kind is another module's constant
    assert len(found) > 40
    assert found == listed()


def test_a_row_of_a_request_has_the_listed_facts() -> None:
    record = RequestRecord("chat", False, "x.y", 1, 1, 1.0, 1.0, 1.0, 500, "camera")
    text = SECTION.rpartition("A row of `inference.segment` has")[2]
    assert set(row("chat", "m:1", record)) == set(re.findall(r"`([a-z_]+)`", text))
