"""One set of assertions for every ``Source``: the fake in memory and the real one over HTTPS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_agent.registry.source import Source
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError
from tests.fakes.memory_source import MemorySource, RegistryContent
from tests.fakes.packages import noise
from tests.fakes.registry_server import serve

BLOB = noise(700_001)
SHA = sha256_hex(BLOB)
MANIFEST = b'{"a": "model"}'
PATH = "models/tiny/1.0.0/manifest.json"


@dataclass
class Rig:
    """A source and the way to break its connection to the other side."""

    source: Source
    broken: Source


@pytest.fixture(params=["memory", "https"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    content = RegistryContent(
        metadata={"timestamp.json": b"now", "2.root.json": b"root two"},
        targets={(sha256_hex(MANIFEST), PATH): MANIFEST},
        blobs={SHA: BLOB},
    )
    if request.param == "memory":
        yield Rig(MemorySource(content), MemorySource(content, unreachable=True))
        return
    with serve(content, tmp_path) as server:
        ca = server.ca_path
        with serve(content, tmp_path / "gone") as gone:
            url = gone.url
        yield Rig(HttpSource(HttpsOpener(server.url, ca)), HttpSource(HttpsOpener(url, ca)))


def test_metadata_by_its_tuf_name(rig: Rig) -> None:
    assert rig.source.metadata("2.root.json", 100) == b"root two"
    assert rig.source.metadata("timestamp.json", 3) == b"now"


def test_what_is_not_there_is_an_answer(rig: Rig) -> None:
    asks: tuple[Callable[[], bytes], ...] = (
        lambda: rig.source.metadata("3.root.json", 100),
        lambda: rig.source.target(PATH, "0" * 64, 100),
        lambda: next(rig.source.blob("0" * 64, 0)),
    )
    for ask in asks:
        with pytest.raises(NotFoundError) as caught:
            ask()
        assert caught.value.code == "source.not_found"


def test_more_than_allowed_is_refused(rig: Rig) -> None:
    asks: tuple[Callable[[], bytes], ...] = (
        lambda: rig.source.metadata("timestamp.json", 2),
        lambda: rig.source.target(PATH, sha256_hex(MANIFEST), 3),
    )
    for ask in asks:
        with pytest.raises(RefusedError) as caught:
            ask()
        assert caught.value.code == "source.too_long"


def test_a_target_by_path_and_digest(rig: Rig) -> None:
    assert rig.source.target(PATH, sha256_hex(MANIFEST), 1000) == MANIFEST


@pytest.mark.parametrize("offset", [0, 1, 262_144, 700_000])
def test_a_blob_from_an_offset_to_its_end(rig: Rig, offset: int) -> None:
    assert b"".join(rig.source.blob(SHA, offset)) == BLOB[offset:]


def test_a_blob_may_be_left_in_the_middle(rig: Rig) -> None:
    stream = rig.source.blob(SHA, 0)
    assert next(stream)
    stream.close()
    assert b"".join(rig.source.blob(SHA, 699_000)) == BLOB[699_000:]


def test_no_network(rig: Rig) -> None:
    asks: tuple[Callable[[], bytes], ...] = (
        lambda: rig.broken.metadata("timestamp.json", 100),
        lambda: rig.broken.target(PATH, sha256_hex(MANIFEST), 100),
        lambda: next(rig.broken.blob(SHA, 0)),
    )
    for ask in asks:
        with pytest.raises(UnavailableError) as caught:
            ask()
        assert caught.value.code == "source.unreachable"
        assert caught.value.retryable
