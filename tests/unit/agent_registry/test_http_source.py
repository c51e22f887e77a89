"""What only HTTPS can do wrong."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError
from tests.fakes.memory_source import RegistryContent
from tests.fakes.packages import noise
from tests.fakes.registry_server import RegistryServer, serve
from tests.fakes.ticks import Ticks

BLOB = noise(300_000)
SHA = sha256_hex(BLOB)
NOW = datetime.now(UTC)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    with serve(RegistryContent(metadata={"timestamp.json": b"x" * 1000}, blobs={SHA: BLOB}), tmp_path) as server:
        yield server


def _source(server: RegistryServer, floor: datetime | None = None) -> HttpSource:
    return HttpSource(HttpsOpener(server.url, server.ca_path, floor=floor))


@pytest.mark.parametrize("status", [301, 401, 403, 416, 429, 500, 503])
def test_other_statuses_mean_try_later(server: RegistryServer, status: int) -> None:
    server.status = status
    with pytest.raises(UnavailableError, match=str(status)) as caught:
        _source(server).metadata("timestamp.json", 5000)
    assert caught.value.code == "source.unreachable"


def test_a_server_that_ignores_range_is_not_read_twice(server: RegistryServer) -> None:
    server.ignore_range = True
    with pytest.raises(UnavailableError, match="200"):
        next(_source(server).blob(SHA, 1000))
    assert b"".join(_source(server).blob(SHA, 0)) == BLOB


def test_a_cut_answer_is_no_short_file(server: RegistryServer) -> None:
    server.truncate_to = 10
    with pytest.raises(UnavailableError, match="after 10 of 1000 bytes"):
        _source(server).metadata("timestamp.json", 5000)


def test_an_endless_answer_is_bounded(server: RegistryServer) -> None:
    server.endless = True
    with pytest.raises(RefusedError) as caught:
        _source(server).metadata("timestamp.json", 5000)
    assert caught.value.code == "source.too_long"


def test_names_cannot_leave_their_folder(server: RegistryServer) -> None:
    with pytest.raises(NotFoundError):
        _source(server).metadata("../blobs/" + SHA, 5000)
    assert server.requests == [(f"/device/v1/metadata/..%2Fblobs%2F{SHA}", None)]


def test_another_ca_is_not_believed(server: RegistryServer, tmp_path: Path) -> None:
    with serve(RegistryContent(), tmp_path / "other") as other:
        foreign = HttpSource(HttpsOpener(server.url, other.ca_path))
        with pytest.raises(UnavailableError, match="certificate verify failed"):
            foreign.metadata("timestamp.json", 5000)


def test_the_bearer_is_sent(server: RegistryServer) -> None:
    source = HttpSource(HttpsOpener(server.url, server.ca_path, bearer=lambda: "secret"))
    source.metadata("timestamp.json", 5000)
    assert server.authorizations == ["Bearer secret"]


@pytest.mark.parametrize("after", [0, 250])
def test_neither_headers_nor_bodies_may_dribble(server: RegistryServer, after: int) -> None:
    server.trickle_after = after
    source = HttpSource(HttpsOpener(server.url, server.ca_path, now_s=Ticks(20)))
    with pytest.raises(UnavailableError, match="fewer than 15360 bytes came in 60 s"):
        source.metadata("timestamp.json", 5000)


def test_many_small_answers_may_not_each_take_their_time(server: RegistryServer) -> None:
    source = HttpSource(HttpsOpener(server.url, server.ca_path, within_s=100, now_s=Ticks(10)))
    assert len(source.metadata("timestamp.json", 5000)) == 1000
    with pytest.raises(UnavailableError, match="fewer than 25600 bytes came in 100 s"):
        [source.metadata("timestamp.json", 5000) for _ in range(10)]


def test_bytes_are_handed_on_as_they_come(server: RegistryServer) -> None:
    server.hold = (SHA, 100)
    stream = _source(server).blob(SHA, 0)
    assert next(stream) == BLOB[:100]
    stream.close()


def test_the_certificate_is_judged_at_the_later_of_clock_and_floor(tmp_path: Path) -> None:
    content = RegistryContent(metadata={"timestamp.json": b"now"})
    soon = NOW + timedelta(days=30)
    with serve(content, tmp_path, valid_from=soon - timedelta(days=1), valid_to=soon + timedelta(days=1)) as server:
        assert _source(server).metadata("timestamp.json", 100) == b"now"
        assert _source(server, soon).metadata("timestamp.json", 100) == b"now"
        with pytest.raises(UnavailableError, match="expired on"):
            _source(server, soon + timedelta(days=2)).metadata("timestamp.json", 100)


def test_a_floor_in_the_past_does_not_excuse_an_expired_certificate(tmp_path: Path) -> None:
    content = RegistryContent(metadata={"timestamp.json": b"now"})
    with (
        serve(content, tmp_path, valid_from=NOW - timedelta(days=3), valid_to=NOW - timedelta(days=1)) as server,
        pytest.raises(UnavailableError, match="expired"),
    ):
        _source(server, NOW - timedelta(days=2)).metadata("timestamp.json", 100)
