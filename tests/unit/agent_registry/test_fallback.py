"""Which carrier is used when: HTTP first, MQTT while HTTP does not reach the controller."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from garrison_agent.registry.fallback_source import HTTP_PAUSE_S, Carrier, FallbackSource, Route, RoutedVerifier
from garrison_agent.registry.mqtt_source import MqttSource
from garrison_agent.registry.verifier import TrustVerifier
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError
from garrison_protocol.states import Freshness
from tests.fakes.frame_controller import FrameController
from tests.fakes.memory_source import MemorySource, RegistryContent
from tests.fakes.packages import make_package, noise
from tests.fakes.tuf_repository import FakeRepository

BLOB = noise(300_000)
SHA = sha256_hex(BLOB)
CONTENT = RegistryContent(metadata={"timestamp.json": b"now"}, blobs={SHA: BLOB})
PAST = datetime(2020, 1, 1, tzinfo=UTC)


CARRIERS: tuple[Carrier, ...] = ("http", "mqtt")


class Rig:
    def __init__(self) -> None:
        self.http = MemorySource(CONTENT)
        self.frames = FrameController(CONTENT)
        self.now_s = 0.0
        self.route = Route("auto", link_up=lambda: self.frames.connected, monotonic_s=lambda: self.now_s)
        self.source = FallbackSource(self.http, self.frames.source(), self.route)


def test_mqtt_steps_in_and_http_is_left_alone_for_a_while() -> None:
    rig = Rig()
    rig.http.unreachable = True
    assert rig.source.metadata("timestamp.json", 10) == b"now"
    assert rig.source.metadata("timestamp.json", 10) == b"now"
    assert (len(rig.http.log), len(rig.frames.asked)) == (1, 2)
    rig.now_s = HTTP_PAUSE_S
    rig.http.unreachable = False
    rig.source.metadata("timestamp.json", 10)
    rig.source.metadata("timestamp.json", 10)
    assert (len(rig.http.log), len(rig.frames.asked)) == (3, 2)


def test_both_are_tried_before_it_is_unreachable() -> None:
    rig = Rig()
    rig.http.unreachable = rig.frames.silent = True
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"source\.unreachable"):
            rig.source.metadata("timestamp.json", 10)
    assert len(rig.http.log) == 2
    assert rig.frames.asked


def test_an_answer_is_final_whoever_gives_it() -> None:
    rig = Rig()
    with pytest.raises(NotFoundError):
        rig.source.metadata("1.root.json", 10)
    with pytest.raises(RefusedError, match=r"source\.too_long"):
        rig.source.metadata("timestamp.json", 2)
    assert rig.frames.asked == []


def test_without_a_broker_only_http_is_asked() -> None:
    rig = Rig()
    rig.http.unreachable, rig.frames.connected = True, False
    with pytest.raises(UnavailableError):
        rig.source.metadata("timestamp.json", 10)
    rig.http.unreachable = False
    assert rig.source.metadata("timestamp.json", 10) == b"now"


def test_a_download_that_breaks_off_goes_on_over_mqtt() -> None:
    rig = Rig()
    rig.http.fail_blob_after = 100_000
    assert b"".join(rig.source.blob(SHA, 0)) == BLOB
    assert rig.http.sent[SHA] == 100_000
    assert rig.frames.asked[0].offset == 100_000


def test_one_carrier_alone() -> None:
    rig = Rig()
    only = {name: FallbackSource(rig.http, rig.frames.source(), Route(name, link_up=lambda: True)) for name in CARRIERS}
    assert b"".join(only["http"].blob(SHA, 0)) == b"".join(only["mqtt"].blob(SHA, 0)) == BLOB
    rig.http.unreachable = True
    with pytest.raises(UnavailableError):
        only["http"].metadata("timestamp.json", 10)
    assert only["mqtt"].metadata("timestamp.json", 10) == b"now"


@pytest.fixture
def repository() -> FakeRepository:
    repository = FakeRepository()
    repository.add(make_package())
    repository.publish()
    return repository


def routed(repository: FakeRepository, folder: Path, mqtt: MqttSource) -> RoutedVerifier:
    (folder / "1.root.json").write_bytes(repository.bootstrap)
    (folder / "server-ca.pem").write_bytes(b"")
    return RoutedVerifier(TrustVerifier(folder, "https://127.0.0.1:1"), mqtt, Route("mqtt", link_up=lambda: True))


def test_the_verifier_process_asks_its_parent_for_what_comes_over_mqtt(
    repository: FakeRepository, tmp_path: Path
) -> None:
    frames = FrameController(repository.content)
    verifier = routed(repository, tmp_path, frames.source())
    path = make_package().path
    view = verifier.refresh({}, PAST, [path])
    assert view.freshness is Freshness.FRESH
    assert list(view.manifests) == [path]
    assert {fetch.name for fetch in frames.asked} >= {"timestamp.json", "2.root.json", path}
    assert verifier.offline(view.high_water, view.refreshed_at, [path]) == view


def test_what_the_parent_is_refused_reaches_the_verifier_process(repository: FakeRepository, tmp_path: Path) -> None:
    frames = FrameController(repository.content)
    frames.tamper = lambda fetch, chunks: [] if "targets" in fetch.name else chunks
    with pytest.raises(UnavailableError) as caught:
        routed(repository, tmp_path, frames.source()).refresh({}, PAST, [])
    assert (caught.value.code, caught.value.retryable) == ("source.unreachable", True)
    repository.content.metadata["timestamp.json"] = bytes(1_000_000)
    frames.tamper = None
    with pytest.raises(RefusedError, match=r"source\.too_long"):
        routed(repository, tmp_path, frames.source()).refresh({}, PAST, [])


def test_an_agent_that_fails_ends_its_verifier_process(repository: FakeRepository, tmp_path: Path) -> None:
    class Broken:
        def metadata(self, name: str, max_bytes: int) -> bytes:
            raise ZeroDivisionError(name, max_bytes)

        def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
            raise ZeroDivisionError(path, sha256, max_bytes)

    (tmp_path / "1.root.json").write_bytes(repository.bootstrap)
    with pytest.raises(ZeroDivisionError):
        TrustVerifier(tmp_path, "https://127.0.0.1:1").refresh({}, PAST, [], Broken())
