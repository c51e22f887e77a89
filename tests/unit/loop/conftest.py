from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.loop.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    board = Rig(tmp_path)
    board.settle()
    yield board
    board.database.close()
