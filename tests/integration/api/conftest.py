"""A local API, and a stand-in worker behind it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.api_site import Site
from tests.fakes.local_owner import LocalOwner
from tests.fakes.worker_server import StandInWorker

Open = Callable[..., Site]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="garrison-") as name:
        yield Path(name)


@pytest.fixture
def worker(folder: Path) -> Iterator[StandInWorker]:
    with StandInWorker(folder / "1.sock") as running:
        yield running


@pytest.fixture
def open_site(folder: Path) -> Iterator[Open]:
    running: list[Site] = []

    def start(owner: LocalOwner, **settings: Any) -> Site:
        running.append(Site(folder, owner, **settings))
        return running[-1]

    yield start
    for site in running:
        site.api.stop()
