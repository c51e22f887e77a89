from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.target import Target
from tests.unit.loop.rig import package
from tests.unit.rollouts.fleet import Fleet


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Target]:
    """A board in service: connected, its metadata fresh, ``chat:1.0`` loaded."""
    target = Target(tmp_path / "board")
    target.settle()
    target.connect()
    target.deploy(package("1.0"), "r1")
    assert target.models.running == ["chat:1.0"]
    yield target
    target.database.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A controller's database with three enrolled boards, ``edge-1`` to ``edge-3``."""
    controller = Fleet(tmp_path)
    yield controller
    controller.close()
