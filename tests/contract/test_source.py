"""One set of assertions for every ``Source``: in memory, over HTTPS, over MQTT, and whichever of the two works."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from garrison_agent.adapters.mqtt import MqttLink
from garrison_agent.api.carrier import Carrier
from garrison_agent.registry.bundle_source import BundleSource
from garrison_agent.registry.fallback_source import FallbackSource, Route
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_agent.registry.mqtt_source import MqttSource, Patience
from garrison_agent.registry.source import Source
from garrison_protocol import bundle, topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError
from garrison_protocol.keys import SigningKey
from garrison_protocol.stick import Stick
from tests.fakes.broker import MosquittoBroker, tls_config
from tests.fakes.fetch_desk import FetchDesk, client_context
from tests.fakes.frame_controller import FrameController
from tests.fakes.memory_source import MemorySource, RegistryContent
from tests.fakes.packages import noise
from tests.fakes.pki import FleetPki
from tests.fakes.registry_server import serve

BLOB = noise(700_001)
SHA = sha256_hex(BLOB)
MANIFEST = b'{"a": "model"}'
PATH = "models/tiny/1.0.0/manifest.json"
DEVICE = "edge-1"
DEADLINE_S = 20.0
CONTENT = RegistryContent(
    metadata={"timestamp.json": b"now", "2.root.json": b"root two", "3.targets.json": noise(100_000)},
    targets={(sha256_hex(MANIFEST), PATH): MANIFEST},
    blobs={SHA: BLOB, sha256_hex(b""): b""},
)


@dataclass
class Rig:
    """A source and the way to break its connection to the other side."""

    source: Source
    broken: Source


@pytest.fixture(
    scope="module",
    params=["memory", "bundle", "https", "frames", "mqtt-5", "mqtt-3.1.1", "auto-http", "auto-mqtt"],
)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("source")
    with contextlib.ExitStack() as stack:
        match request.param:
            case "memory":
                yield Rig(MemorySource(CONTENT), MemorySource(CONTENT, unreachable=True))
            case "bundle":
                yield Rig(*stack.enter_context(sticks(folder)))
            case "https":
                yield Rig(*stack.enter_context(https(folder)))
            case "frames":
                yield Rig(FrameController(CONTENT).source(), FrameController(CONTENT, silent=True).source())
            case "mqtt-5":
                yield Rig(*stack.enter_context(mqtt(folder, "5")))
            case "mqtt-3.1.1":
                yield Rig(*stack.enter_context(mqtt(folder, "3.1.1")))
            case "auto-http":
                good, gone = stack.enter_context(https(folder))
                silent = FrameController(CONTENT, silent=True).source()
                yield Rig(FallbackSource(good, silent, route()), FallbackSource(gone, silent, route()))
            case "auto-mqtt":
                _, gone = stack.enter_context(https(folder))
                frames, silent = FrameController(CONTENT).source(), FrameController(CONTENT, silent=True).source()
                yield Rig(FallbackSource(gone, frames, route()), FallbackSource(gone, silent, route()))


def route() -> Route:
    return Route("auto", link_up=lambda: True)


@contextlib.contextmanager
def sticks(folder: Path) -> Iterator[tuple[Source, Source]]:
    """A stick, and one that was pulled out."""
    with Stick(folder) as stick:
        for name, data in CONTENT.metadata.items():
            stick.write(bundle.metadata_path(name), [data])
        for (sha256, path), data in CONTENT.targets.items():
            stick.write(bundle.target_path(path, sha256), [data])
        for sha256, data in CONTENT.blobs.items():
            stick.write(bundle.blob_path(sha256), [data])
        pulled_out = Carrier(answer_s=0.1)
        yield BundleSource(stick), BundleSource(pulled_out)


@contextlib.contextmanager
def https(folder: Path) -> Iterator[tuple[Source, Source]]:
    with serve(CONTENT, folder) as server:
        with serve(CONTENT, folder / "gone") as gone:
            url = gone.url
        yield HttpSource(HttpsOpener(server.url, server.ca_path)), HttpSource(HttpsOpener(url, server.ca_path))


@contextlib.contextmanager
def mqtt(folder: Path, protocol: Literal["5", "3.1.1"]) -> Iterator[tuple[Source, Source]]:
    """A board's real link, a real Mosquitto, and the controller's real workers."""
    pki = FleetPki(folder / "pki")
    key = SigningKey.generate()
    with MosquittoBroker(folder / "broker", tls_config(pki, folder / "broker")) as broker:
        desk = FetchDesk(CONTENT, folder / "controller", pki, port=broker.port, protocol=protocol)
        desk.admit(DEVICE, key)
        desk.start()
        chunks = topics.down(DEVICE, topics.Down.CHUNK)

        def receive(topic: str, frame: bytes) -> None:
            if topic == chunks:
                source.receive(frame)

        link = MqttLink(
            address=lambda: ("127.0.0.1", broker.port),
            device=DEVICE,
            tls=lambda: client_context(pki, pki.issue(DEVICE)),
            protocol=protocol,
            keepalive_s=30,
            reconnect_max_s=0.2,
            will=lambda: b"{}",
            on_connected=lambda: None,
            on_disconnected=lambda _reason: None,
            on_message=receive,
        )
        source = MqttSource(
            device=DEVICE,
            key=key,
            send=link.send,
            connected=lambda: link.connected,
            patience=Patience(stall_s=5, give_up_s=DEADLINE_S),
        )
        stranger = MqttSource(  # nobody answers whom the controller does not know
            device=DEVICE,
            key=SigningKey.generate(),
            send=link.send,
            connected=lambda: link.connected,
            patience=Patience(stall_s=0.1, give_up_s=0.3),
        )
        link.start()
        try:
            deadline_s = time.monotonic() + DEADLINE_S
            while not link.connected:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            yield source, stranger
        finally:
            link.stop()
            desk.stop()


def first(source: Source, sha256: str) -> bytes:
    with contextlib.closing(source.blob(sha256, 0)) as pieces:
        return next(piece for piece in pieces if piece)


def test_metadata_by_its_tuf_name(rig: Rig) -> None:
    assert rig.source.metadata("2.root.json", 100) == b"root two"
    assert rig.source.metadata("timestamp.json", 3) == b"now"
    assert rig.source.metadata("3.targets.json", 100_000) == CONTENT.metadata["3.targets.json"]


def test_what_is_not_there_is_an_answer(rig: Rig) -> None:
    asks: tuple[Callable[[], bytes], ...] = (
        lambda: rig.source.metadata("3.root.json", 100),
        lambda: rig.source.metadata("../../etc/passwd", 100),
        lambda: rig.source.target(PATH, "0" * 64, 100),
        lambda: rig.source.target(PATH, "no digest", 100),
        lambda: first(rig.source, "0" * 64),
    )
    for ask in asks:
        with pytest.raises(NotFoundError) as caught:
            ask()
        assert caught.value.code == "source.not_found"


def test_more_than_allowed_is_refused(rig: Rig) -> None:
    asks: tuple[Callable[[], bytes], ...] = (
        lambda: rig.source.metadata("timestamp.json", 2),
        lambda: rig.source.metadata("3.targets.json", 99_999),
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


def test_an_empty_blob(rig: Rig) -> None:
    assert b"".join(rig.source.blob(sha256_hex(b""), 0)) == b""


def test_a_blob_may_be_left_in_the_middle(rig: Rig) -> None:
    assert first(rig.source, SHA)
    assert b"".join(rig.source.blob(SHA, 699_000)) == BLOB[699_000:]


def test_no_network(rig: Rig) -> None:
    asks: tuple[Callable[[], bytes], ...] = (
        lambda: rig.broken.metadata("timestamp.json", 100),
        lambda: rig.broken.target(PATH, sha256_hex(MANIFEST), 100),
        lambda: first(rig.broken, SHA),
    )
    for ask in asks:
        with pytest.raises(UnavailableError) as caught:
            ask()
        assert caught.value.code == "source.unreachable"
        assert caught.value.retryable
