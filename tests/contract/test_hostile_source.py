"""Servers that misbehave, over HTTPS and over MQTT: what every ``Source`` makes of it, and what is installed.

A source carries and never decides, so wrong bytes may come out of it; but never more than was allowed, never for ever,
and a download on top of it installs what was signed or nothing.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pytest

from garrison_agent.https import Answer
from garrison_agent.registry.download import download_variant
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_agent.registry.source import Source
from garrison_agent.registry.windows import AHEAD_BYTES, SLOW_S
from garrison_protocol.errors import GarrisonError, NotFoundError, RefusedError, UnavailableError
from garrison_protocol.manifest import Manifest
from garrison_protocol.messages.fetch import Chunk, ChunkStatus, Fetch, FetchRefusal, pack_chunk
from tests.fakes.frame_controller import AT_ONCE, FrameController
from tests.fakes.memory_source import RegistryContent
from tests.fakes.packages import make_package, noise
from tests.fakes.registry_server import RegistryServer, serve
from tests.fakes.ticks import Ticks

WHOLE = noise(50_000)
PACKAGE = make_package(files={"model.gguf": noise(1_000_000)})
FILE = PACKAGE.variant.files[0]
SLOW_BYTES_PER_S = 5000


class Hostile(Protocol):
    """A server and the ways in which it can misbehave."""

    source: Source
    content: RegistryContent

    def short(self) -> None:
        """Every answer ends too early."""

    def endless(self) -> None:
        """No answer ends."""

    def stuck(self) -> None:
        """Answers do not go on, if they begin at all."""

    def dribbling(self, after: int) -> None:
        """So many bytes of an answer come as ever; then there is a little before each time-out."""

    def slow(self) -> None:
        """Everything comes as it does over 2G, at 5 kB/s."""

    def well(self) -> None:
        """Everything is as it should be again, after ``dribbling``."""

    def refusing(self) -> None:
        """Every answer is an error."""


class HostileHttps:
    def __init__(self, server: RegistryServer) -> None:
        self.server, self.content = server, server.content
        self.source: Source = HttpSource(self._open)
        self.opener = HttpsOpener(server.url, server.ca_path)

    def _open(self, path: str, headers: dict[str, str]) -> Answer:
        return self.opener(path, headers)

    def short(self) -> None:
        self.server.truncate_to = 20_000

    def endless(self) -> None:
        self.server.endless = True

    def stuck(self) -> None:
        self.server.hold = ("", 10)
        self.opener = HttpsOpener(self.server.url, self.server.ca_path, timeout_s=0.2)

    def dribbling(self, after: int) -> None:
        self.server.trickle_after = after
        self.slow()

    def slow(self) -> None:
        # Between two looks into the clock a record comes, of 16 KiB at most, or of one byte.
        self.opener = HttpsOpener(self.server.url, self.server.ca_path, now_s=Ticks(16 * 1024 / SLOW_BYTES_PER_S))

    def well(self) -> None:
        self.server.trickle_after = None
        self.opener = HttpsOpener(self.server.url, self.server.ca_path)

    def refusing(self) -> None:
        self.server.status = 503


class HostileFrames:
    def __init__(self, content: RegistryContent) -> None:
        self.frames, self.content = FrameController(content), content
        self.source: Source = self.frames.source()

    def short(self) -> None:
        self.frames.tamper = lambda _fetch, chunks: chunks[:1] if chunks[0].offset == 0 else []

    def endless(self) -> None:
        def go_on(fetch: Fetch, _chunks: list[Chunk]) -> Iterator[Chunk]:
            for at in range(fetch.offset, fetch.offset + fetch.length, fetch.piece):
                size = min(fetch.piece, fetch.offset + fetch.length - at)
                yield Chunk(fetch.request, at, 2**60, ChunkStatus.DATA, bytes(size))

        self.frames.tamper = go_on

    def stuck(self) -> None:
        self.frames.silent = True

    def dribbling(self, after: int) -> None:
        # Before, they come so slowly that pieces stay small.
        self.frames.late = lambda chunk: SLOW_S + 1 if chunk.offset < after else AT_ONCE.give_up_s - 1

    def slow(self) -> None:
        self.frames.late = lambda chunk: len(chunk.data) / SLOW_BYTES_PER_S

    def well(self) -> None:
        self.frames.late = None

    def refusing(self) -> None:
        self.frames.refuse = FetchRefusal(code="device.revoked", message="no", status=403)


@pytest.fixture(params=["https", "mqtt"])
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hostile]:
    content = RegistryContent(metadata={"timestamp.json": WHOLE}, blobs=dict(PACKAGE.blobs))
    if request.param == "mqtt":
        yield HostileFrames(content)
        return
    with serve(content, tmp_path / "server") as server:
        yield HostileHttps(server)


def download(source: Source, store: BlobStore, manifest: Manifest = PACKAGE.manifest) -> None:
    download_variant(
        manifest,
        manifest.variants[0],
        source,
        store,
        progress=lambda _done, _total: None,
        cancelled=lambda: False,
    )


def installs_nothing(source: Source, folder: Path) -> GarrisonError:
    store = BlobStore(folder / "blobs")
    with pytest.raises(GarrisonError) as caught:
        download(source, store)
    assert store.list() == ()
    return caught.value


def test_wrong_bytes(hostile: Hostile, tmp_path: Path) -> None:
    hostile.content.blobs[FILE.sha256] = noise(FILE.size, seed=2)
    assert installs_nothing(hostile.source, tmp_path).code == "download.digest_mismatch"


def test_the_bytes_of_another_blob(hostile: Hostile, tmp_path: Path) -> None:
    hostile.content.blobs[FILE.chunks_sha256] = WHOLE
    assert installs_nothing(hostile.source, tmp_path).code == "download.too_long"


def test_short_metadata(hostile: Hostile) -> None:
    hostile.short()
    with pytest.raises(UnavailableError, match=r"source\.unreachable"):
        hostile.source.metadata("timestamp.json", 100_000)


def test_a_short_blob(hostile: Hostile, tmp_path: Path) -> None:
    hostile.short()
    assert installs_nothing(hostile.source, tmp_path).retryable


def test_endless_metadata(hostile: Hostile) -> None:
    hostile.endless()
    with pytest.raises(RefusedError, match=r"source\.too_long"):
        hostile.source.metadata("timestamp.json", 100_000)


def test_an_endless_blob(hostile: Hostile, tmp_path: Path) -> None:
    hostile.endless()
    tracemalloc.start()
    try:
        installs_nothing(hostile.source, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 * AHEAD_BYTES
    finally:
        tracemalloc.stop()


def test_an_answer_that_never_goes_on(hostile: Hostile) -> None:
    hostile.stuck()
    with pytest.raises(UnavailableError, match=r"source\.unreachable") as caught:
        hostile.source.metadata("timestamp.json", 100_000)
    assert caught.value.retryable


def test_an_answer_that_dribbles(hostile: Hostile, tmp_path: Path) -> None:
    hostile.dribbling(after=0)
    with pytest.raises(UnavailableError, match=r"source\.unreachable.*fewer than") as caught:
        hostile.source.metadata("timestamp.json", 100_000)
    assert caught.value.retryable
    assert installs_nothing(hostile.source, tmp_path).code == "source.unreachable"


def test_after_a_dribble_a_download_goes_on_where_it_was(hostile: Hostile, tmp_path: Path) -> None:
    hostile.dribbling(after=700_000)
    installs_nothing(hostile.source, tmp_path)
    hostile.well()
    store, reports = BlobStore(tmp_path / "blobs"), []
    download_variant(
        PACKAGE.manifest,
        PACKAGE.variant,
        hostile.source,
        store,
        progress=lambda done, _total: reports.append(done),
        cancelled=lambda: False,
    )
    assert reports[0] >= 2 * FILE.chunk_size
    assert [blob.sha256 for blob in store.list()] == [FILE.sha256]


def test_a_slow_link_is_no_dribble(hostile: Hostile, tmp_path: Path) -> None:
    hostile.slow()
    assert hostile.source.metadata("timestamp.json", 100_000) == WHOLE
    store = BlobStore(tmp_path / "blobs")
    download(hostile.source, store)
    assert [blob.sha256 for blob in store.list()] == [FILE.sha256]


def test_a_refusal(hostile: Hostile, tmp_path: Path) -> None:
    hostile.refusing()
    assert installs_nothing(hostile.source, tmp_path).retryable


# --- frames alone: over HTTP, TLS and TCP rule these out ---


def backwards(_fetch: Fetch, chunks: list[Chunk]) -> list[Chunk]:
    return chunks[::-1]


def twice(_fetch: Fetch, chunks: list[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks for _ in range(2)]


def with_foreign(fetch: Fetch, chunks: list[Chunk]) -> Iterator[Chunk | bytes]:
    """Between the honest chunks come ones for another request, at other places, of other lengths, and garbage."""
    for chunk in chunks:
        yield replace(chunk, request="f" * 16, data=bytes(len(chunk.data)))
        yield replace(chunk, offset=chunk.offset + 1, data=bytes(len(chunk.data)))
        yield replace(chunk, offset=fetch.offset + fetch.length, data=bytes(len(chunk.data)))
        yield replace(chunk, data=chunk.data[:-1])
        yield replace(chunk, data=chunk.data + b"!")
        yield from (b"", b"GCH1", bytes(300_000), pack_chunk(chunk)[:-1], b"X" + pack_chunk(chunk)[1:])
        yield chunk
        yield replace(chunk, data=bytes(len(chunk.data)))  # too late: this place is taken


def every_other_lost() -> Callable[[Fetch, list[Chunk]], list[Chunk]]:
    counter = itertools.count()
    return lambda _fetch, chunks: [chunk for chunk in chunks if next(counter) % 2]


@pytest.mark.parametrize("tamper", [backwards, twice, with_foreign, every_other_lost()])
def test_frames_in_disorder_still_give_the_right_bytes(
    tamper: Callable[[Fetch, list[Chunk]], list[Chunk]], tmp_path: Path
) -> None:
    hostile = HostileFrames(RegistryContent(metadata={"timestamp.json": WHOLE}, blobs=dict(PACKAGE.blobs)))
    hostile.frames.tamper = tamper
    assert hostile.source.metadata("timestamp.json", len(WHOLE)) == WHOLE
    store = BlobStore(tmp_path / "blobs")
    download(hostile.source, store)
    assert [blob.sha256 for blob in store.list()] == [FILE.sha256]


@dataclass
class _Case:
    refusal: FetchRefusal | bytes
    kind: type[GarrisonError]
    code: str


@pytest.mark.parametrize(
    "case",
    [
        _Case(FetchRefusal(code="blob.not_found", message="no", status=404), NotFoundError, "source.not_found"),
        _Case(FetchRefusal(code="device.revoked", message="no", status=403), RefusedError, "device.revoked"),
        _Case(FetchRefusal(code="database.busy", message="no", status=503), UnavailableError, "database.busy"),
        _Case(FetchRefusal(code="internal.failed", message="no", status=500), GarrisonError, "internal.failed"),
        _Case(b"", UnavailableError, "source.unreachable"),
        _Case(b"{}", UnavailableError, "source.unreachable"),
        _Case(b'{"code": "../\\u0000", "message": "x", "status": 403}', UnavailableError, "source.unreachable"),
        _Case(b'{"code": "a.b", "message": "\\ud800", "status": 403}', UnavailableError, "source.unreachable"),
        _Case(b"[" * 100_000, UnavailableError, "source.unreachable"),
    ],
)
def test_error_frames_are_never_final_since_nobody_signs_them(case: _Case) -> None:
    hostile = HostileFrames(RegistryContent())
    data = case.refusal if isinstance(case.refusal, bytes) else case.refusal.model_dump_json().encode()
    hostile.frames.tamper = lambda fetch, _chunks: [Chunk(fetch.request, 0, 0, ChunkStatus.ERROR, data)]
    with pytest.raises(case.kind) as caught:
        b"".join(hostile.source.blob(FILE.sha256, 0))
    assert (caught.value.code, caught.value.retryable) == (case.code, True)


def test_an_error_for_another_request_changes_nothing() -> None:
    hostile = HostileFrames(RegistryContent(metadata={"timestamp.json": WHOLE}))
    refusal = FetchRefusal(code="device.revoked", message="no", status=403).model_dump_json().encode()
    hostile.frames.tamper = lambda _fetch, chunks: [Chunk("f" * 16, 0, 0, ChunkStatus.ERROR, refusal), *chunks]
    assert hostile.source.metadata("timestamp.json", len(WHOLE)) == WHOLE
