"""Inputs that once broke a promise; ``make fuzz`` leaves new ones here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.entries import ENTRIES

FOLDER = Path(__file__).parent / "regressions"
CASES = sorted(path.relative_to(FOLDER) for path in FOLDER.glob("*/*"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_found_stays_fixed(case: Path) -> None:
    ENTRIES[case.parts[0]]((FOLDER / case).read_bytes())


def test_every_case_belongs_to_an_entry() -> None:
    assert {case.parts[0] for case in CASES} <= set(ENTRIES)
