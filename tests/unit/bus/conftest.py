from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.rollouts.fleet import Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()
