"""docs/security.md, "Attacks", names each test of this folder once, and every test says what it attacks."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "security.md"
BEGIN, END = "<!-- attacks: begin -->", "<!-- attacks: end -->"
ROW = re.compile(r"\| (?P<attack>[^|]{10,}) \| (?P<stopped_by>[^|]{10,}) \| (?P<tests>[^|]+) \|")
TEST = re.compile(r"`(test_[a-z0-9_]+\.py)::(test_[A-Za-z0-9_]+)`")


def written() -> dict[tuple[str, str], str]:
    """Return every test of an attack in this folder, by file and name, with its docstring ("" for none).

    A test that shows the honest case says so: "No attack: ...".
    """
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        if path.name == Path(__file__).name:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found[path.name, node.name] = ast.get_docstring(node) or ""
    return {test: docstring for test, docstring in found.items() if not docstring.startswith("No attack:")}


def rows() -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each row of the table: the attack, and the tests that it names."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert lines[:2] == ["| attack | what stops it | test |", "|---|---|---|"]
    found = []
    for line in lines[2:]:
        row = ROW.fullmatch(line)
        assert row is not None, f"no row of the table: {line}"
        tests = TEST.findall(row["tests"])
        assert TEST.sub("", row["tests"]).strip(", ") == "", f"something else than tests in: {line}"
        found.append((row["attack"], tests))
    return found


def test_every_test_is_in_the_table_once() -> None:
    listed = Counter(test for _, tests in rows() for test in tests)
    assert sorted(set(written()) - set(listed)) == []
    assert [test for test, times in listed.items() if times > 1] == []


def test_every_row_names_a_test_that_exists() -> None:
    assert sorted({test for _, tests in rows() for test in tests} - set(written())) == []
    assert [attack for attack, tests in rows() if not tests] == []


def test_every_test_says_what_it_attacks() -> None:
    silent = [name for name, docstring in written().items() if len(docstring.partition("\n")[0]) < 20]
    assert silent == []
