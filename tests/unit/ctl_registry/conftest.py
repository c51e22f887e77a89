from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.ceremony import Ceremony, make_ceremony
from tests.fakes.published import PublishedRegistry


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    return make_ceremony(tmp_path)


@pytest.fixture
def empty(ceremony: Ceremony) -> Iterator[PublishedRegistry]:
    """A registry before its first publication."""
    registry = PublishedRegistry(ceremony)
    yield registry
    registry.close()


@pytest.fixture
def published(ceremony: Ceremony, empty: PublishedRegistry) -> PublishedRegistry:
    """A registry with root 1 and targets 1."""
    ceremony.sign("alice", "bob", "dan", "erin")
    empty.push()
    return empty
