from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from garrison_controller.db.base import Database
from garrison_controller.devices.ca import Authority
from tests.unit.devices.boards import NOW
from tests.unit.devices.site import Site


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create("Garrison device CA", NOW)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.create_all()
    yield database
    database.close()


@pytest.fixture
def site(database: Database, authority: Authority) -> Site:
    return Site(database, authority)
