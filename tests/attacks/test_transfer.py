"""Attacks on the way of registry bytes, by whoever sits between board and controller, or is a board itself.

Those on a board run against both carriers, HTTPS and frames over the broker.
"""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from garrison_agent.adapters.mqtt import MqttLink
from garrison_agent.https import Answer
from garrison_agent.owner.jobs import IsCancelled, Report
from garrison_agent.registry.fallback_source import FallbackSource, Route
from garrison_agent.registry.windows import AHEAD_BYTES
from garrison_controller.audit.tables import Refusal
from garrison_controller.bus.fetch import PER_BOARD, Fetches
from garrison_protocol import envelope, topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import Manifest, Variant
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.fetch import (
    FETCH_KIND,
    Chunk,
    ChunkStatus,
    Fetch,
    FetchKind,
    FetchRefusal,
    pack_chunk,
    unpack_chunk,
)
from garrison_protocol.messages.streams import AUDIT_KIND
from garrison_protocol.topics import Down, Up
from tests.attacks.target import RegistryWork, Target
from tests.contract.test_hostile_source import Hostile, HostileFrames, HostileHttps
from tests.fakes.broker import MosquittoBroker, tls_config
from tests.fakes.fetch_desk import FetchDesk, client_context
from tests.fakes.memory_source import RegistryContent
from tests.fakes.packages import make_package, noise
from tests.fakes.pki import FleetPki
from tests.fakes.registry_server import serve
from tests.integration.controllers import wait_until
from tests.unit.loop.rig import entry, package
from tests.unit.rollouts.fleet import FakeBoard, Fleet

NEW = package("2.0")
FILE = NEW.variant.files[0]
LARGE = make_package("chat", "2.1", files={"model.gguf": noise(600_000)}, chunk_size=64 * 1024)
WEIGHTS = LARGE.variant.files[0]


@pytest.fixture(params=["https", "mqtt"])
def carrier(request: pytest.FixtureRequest, board: Target, tmp_path: Path) -> Iterator[Hostile]:
    """The attacker's place on the way: ``chat:2.0`` is published, and everything comes through here."""
    board.repository.add(NEW)
    board.repository.publish()
    assert isinstance(board.work, RegistryWork)
    if request.param == "mqtt":
        frames = HostileFrames(board.repository.content)
        board.work.source = frames.source
        yield frames
        return
    with serve(board.repository.content, tmp_path / "mirror") as server:
        https = HostileHttps(server)
        board.work.source = https.source
        yield https


@pytest.fixture(params=["chunk list", "file"])
def blob(request: pytest.FixtureRequest) -> str:
    """The SHA-256 of one of the blobs that ``chat:2.0`` consists of."""
    return FILE.sha256 if request.param == "file" else FILE.chunks_sha256


def endless_for(carrier: Hostile, blob: str) -> None:
    """Let this blob alone go on with zeros for ever, behind the bytes that it should have."""
    if isinstance(carrier, HostileHttps):
        server, opener = carrier.server, carrier.opener

        def open_(path: str, headers: dict[str, str]) -> Answer:
            server.endless = path.endswith(blob)
            return opener(path, headers)

        carrier.opener = open_  # type: ignore[assignment]
        return
    assert isinstance(carrier, HostileFrames)
    whole = carrier.content.blobs[blob]

    def go_on(fetch: Fetch, chunks: list[Chunk]) -> Iterable[Chunk]:
        if fetch.sha256 != blob:
            yield from chunks
            return
        end = fetch.offset + fetch.length
        for at in range(fetch.offset, end, fetch.piece):
            size = min(fetch.piece, end - at)
            data = whole[at : at + size].ljust(size, b"\0")
            yield Chunk(fetch.request, at, 2**60, ChunkStatus.DATA, data)

    carrier.frames.tamper = go_on


def stuck_for(carrier: Hostile, blob: str) -> None:
    """Let the answer for this blob alone not go on."""
    if isinstance(carrier, HostileHttps):
        carrier.stuck()
        carrier.server.hold = (blob, 10)
        return
    assert isinstance(carrier, HostileFrames)
    carrier.frames.tamper = lambda fetch, chunks: [] if fetch.sha256 == blob else chunks


def was_asked(carrier: Hostile, blob: str) -> bool:
    """Tell whether the board ever asked for this blob."""
    if isinstance(carrier, HostileHttps):
        return any(path.endswith(f"/blobs/{blob}") for path, _ in carrier.server.requests)
    assert isinstance(carrier, HostileFrames)
    return any(fetch.kind is FetchKind.BLOB and fetch.sha256 == blob for fetch in carrier.frames.asked)


def deploy_refused(board: Target) -> str | None:
    """Desire ``chat:2.0``; assert that nothing of it is installed and 1.0 serves; return the code that is shown."""
    served, running = board.served, board.models.running
    board.desire(entry(NEW.ref, "r2"))
    board.settle()
    assert (board.served, board.models.running) == (served, running)
    assert not board.shelf.blobs.has(FILE.sha256, FILE.size)
    return board.slot.error_code


def test_endless_data_in_place_of_metadata(board: Target, carrier: Hostile) -> None:
    """Endless data: whoever answers in the controller's place never stops sending a metadata file."""
    tracemalloc.start()
    try:
        with board.refusing_metadata("source.too_long"):
            carrier.endless()
        assert tracemalloc.get_traced_memory()[1] < 2 * AHEAD_BYTES
    finally:
        tracemalloc.stop()


def test_endless_data_in_place_of_a_model(board: Target, carrier: Hostile, blob: str) -> None:
    """Endless data: a model file, or the list of its chunks, goes on and on behind its signed length."""
    board.look()
    endless_for(carrier, blob)
    tracemalloc.start()
    try:
        assert deploy_refused(board) == "download.too_long"
        assert was_asked(carrier, blob)
        assert tracemalloc.get_traced_memory()[1] < 3 * AHEAD_BYTES
    finally:
        tracemalloc.stop()


def test_slow_retrieval_of_metadata(board: Target, carrier: Hostile) -> None:
    """Slow retrieval: no answer ever goes on, to keep a board at its old model without a word."""
    carrier.stuck()
    assert deploy_refused(board) == "source.unreachable"
    assert board.state == "WAITING"
    assert board.headers("deployment.waiting")[-1]["code"] == "source.unreachable"


def test_slow_retrieval_of_a_model(board: Target, carrier: Hostile, blob: str) -> None:
    """Slow retrieval: metadata comes as ever, but a model file, or the list of its chunks, never goes on."""
    board.look()
    stuck_for(carrier, blob)
    assert deploy_refused(board) == "source.unreachable"
    assert was_asked(carrier, blob)
    assert board.state == "WAITING"
    assert board.headers("deployment.waiting")[-1]["code"] == "source.unreachable"


def test_a_model_that_dribbles(board: Target, carrier: Hostile) -> None:
    """Slow retrieval: a little comes before each time-out, to keep a board downloading for years."""
    board.repository.add(LARGE)
    board.repository.publish()
    board.look()
    carrier.dribbling(after=300_000)
    served = board.served
    board.desire(entry(LARGE.ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "source.unreachable")
    assert board.headers("deployment.waiting")[-1]["code"] == "source.unreachable"
    assert board.served == served
    carrier.well()
    board.clock.forward(3600)
    board.settle()
    assert board.shelf.blobs.has(WEIGHTS.sha256, WEIGHTS.size)


def test_a_model_that_dribbles_over_one_way_only(board: Target, tmp_path: Path) -> None:
    """Slow retrieval: whoever holds the way of HTTPS lets it dribble, while the broker would bring everything."""
    board.repository.add(LARGE)
    board.repository.publish()
    board.look()
    assert isinstance(board.work, RegistryWork)
    frames = HostileFrames(board.repository.content)
    with serve(board.repository.content, tmp_path / "mirror") as server:
        https = HostileHttps(server)
        board.work.source = FallbackSource(https.source, frames.source, Route("auto", link_up=lambda: True))
        https.dribbling(after=300_000)
        board.desire(entry(LARGE.ref, "r2"))
        board.settle()
    assert board.shelf.blobs.has(WEIGHTS.sha256, WEIGHTS.size)
    first = next(fetch for fetch in frames.frames.asked if fetch.sha256 == WEIGHTS.sha256)
    assert first.offset > 290_000  # what HTTPS brought is not fetched again


def test_a_malicious_mirror_of_models(board: Target, carrier: Hostile) -> None:
    """Malicious mirror: whoever carries a model changes one byte of it, or sends another file of equal length."""
    board.look()
    changed = bytearray(carrier.content.blobs[FILE.sha256])
    changed[len(changed) // 2] ^= 1
    carrier.content.blobs[FILE.sha256] = bytes(changed)
    assert deploy_refused(board) == "download.digest_mismatch"


def test_arbitrary_bytes_in_place_of_everything(board: Target, carrier: Hostile, blob: str) -> None:
    """Arbitrary bytes: random data is sent for every metadata file, then for a model file or the list of its chunks."""
    honest = dict(carrier.content.metadata)
    with board.refusing_metadata("registry.damaged"):
        for number, name in enumerate(carrier.content.metadata):
            carrier.content.metadata[name] = noise(3000, seed=number)
    carrier.content.metadata.update(honest)
    carrier.content.blobs[blob] = noise(len(carrier.content.blobs[blob]))
    assert deploy_refused(board) == "download.digest_mismatch"
    assert was_asked(carrier, blob)


# --- the broker, without TLS of the controller's in between ---


def over_mqtt(board: Target, monkeypatch: pytest.MonkeyPatch) -> HostileFrames:
    """Let the board get everything through a broker, as ``owner.work.BoardWork`` does it."""
    board.repository.add(NEW)
    board.repository.publish()
    board.look()
    frames = HostileFrames(board.repository.content)
    source, work = frames.frames.source(), board.work
    assert isinstance(work, RegistryWork)
    work.source, download = source, work.download

    def blamed(manifest: Manifest, variant: Variant, report: Report, cancelled: IsCancelled) -> None:
        with source.blamed():
            download(manifest, variant, report, cancelled)

    monkeypatch.setattr(work, "download", blamed)
    return frames


def test_a_chunk_that_the_broker_slips_in(board: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected chunk: a stolen broker sends its own bytes under the board's request, before the controller's."""
    frames = over_mqtt(board, monkeypatch)

    def slip_in(fetch: Fetch, chunks: list[Chunk]) -> list[Chunk]:
        forged = replace(chunks[0], data=bytes(len(chunks[0].data)))
        return [forged, *chunks] if fetch.kind is FetchKind.BLOB else chunks

    frames.frames.tamper = slip_in
    assert deploy_refused(board) == "source.damaged"
    assert board.state == "WAITING"
    frames.frames.tamper = None  # the broker is taken back, and the deployment goes on by itself
    board.clock.forward(3600)
    board.settle()
    assert board.shelf.blobs.has(FILE.sha256, FILE.size)


def test_frames_that_nobody_asked_for() -> None:
    """Injected frames: a stolen broker floods a board with frames of every kind that answer none of its requests."""
    content = RegistryContent(metadata={"timestamp.json": b"now"})
    source = HostileFrames(content).frames.source()
    refusal = FetchRefusal(code="device.revoked", message="no", status=403).model_dump_json().encode()
    tracemalloc.start()
    try:
        for number in range(2000):
            request = f"{number:016x}"
            source.receive(pack_chunk(Chunk(request, 0, 2**60, ChunkStatus.DATA, bytes(100_000))))
            source.receive(pack_chunk(Chunk(request, 0, 0, ChunkStatus.ERROR, refusal)))
            source.receive(noise(200, seed=number))
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()
    assert source.metadata("timestamp.json", 10) == b"now"


def test_a_refusal_that_the_broker_makes_up(board: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forged refusal: a stolen broker answers every fetch with "revoked", or "no such file", to end a deployment."""
    frames = over_mqtt(board, monkeypatch)
    frames.refusing()
    assert deploy_refused(board) == "device.revoked"
    assert board.state == "WAITING"
    frames.frames.refuse = FetchRefusal(code="blob.not_found", message="no", status=404)
    board.clock.forward(3600)
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "source.not_found")


# --- boards against the controller and each other ---


class Desk:
    """The controller's answers over a database, with frames collected; while ``go`` is not set, the first one waits."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.path = fleet, folder / "file"
        self.path.write_bytes(noise(300_000))
        self.frames: list[tuple[str, Chunk]] = []
        self.sending = threading.Event()
        self.go = threading.Event()
        self.asked_documents: list[Fetch] = []
        self.fetches = Fetches(fleet.database, self, send=self._send, now=fleet.clock)
        self.fetches.start()

    def file(self, _fetch: Fetch) -> Path:
        return self.path

    def document(self, fetch: Fetch) -> bytes:
        self.asked_documents.append(fetch)
        return b"{}"

    def _send(self, topic: str, frame: bytes) -> bool:
        self.sending.set()
        self.go.wait()
        self.frames.append((topics.parse(topic).device, unpack_chunk(frame)))
        return True

    def refusals(self) -> dict[tuple[str, str], int]:
        with self.fleet.database.reading() as session:
            return {(row.sender, row.code): row.count for row in session.scalars(select(Refusal))}


@pytest.fixture
def desk(fleet: Fleet, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(fleet, tmp_path)
    yield desk
    desk.go.set()
    desk.fetches.stop()


def sealed(board: FakeBoard, *, kind: str = "blob", length: int = 4096, signer: SigningKey | None = None) -> bytes:
    fetch = Fetch(
        device=board.device,
        request="0" * 16,
        kind=FetchKind(kind),
        sha256=sha256_hex(b"") if kind == "blob" else None,
        length=length,
        piece=4096,
    )
    return envelope.seal(FETCH_KIND, encode(fetch), signer or board.key)


def test_a_board_asks_with_the_envelope_of_another(desk: Desk) -> None:
    """Board A asks with B's envelope: a captured fetch of one board is sent on the topic of another."""
    desk.go.set()
    a, b, *_ = desk.fleet.boards.values()
    desk.fetches.offer(a.device, sealed(b))
    desk.fetches.offer(b.device, sealed(a, signer=b.key))  # signed by b, but it says that it is a
    expected = {(a.device, "envelope.key_unknown"): 1, (b.device, "message.misaddressed"): 1}
    wait_until(lambda: desk.refusals() == expected, "the refusals")
    assert desk.frames == []


def test_a_nonce_or_certificate_for_another_board(desk: Desk) -> None:
    """Foreign renewal: a board asks, with a key of its own making, for the certificate of another."""
    desk.go.set()
    a, *_ = desk.fleet.boards.values()
    for kind in ("nonce", "certificate", "anchor"):
        desk.fetches.offer(a.device, sealed(a, kind=kind, signer=SigningKey.generate()))
    wait_until(lambda: not desk.fetches._boards, "the workers")
    assert (desk.frames, desk.asked_documents) == ([], [])


def test_another_message_of_the_board_replayed_as_a_fetch(desk: Desk) -> None:
    """Type confusion: a signed audit batch of a board is replayed by the broker as a fetch."""
    desk.go.set()
    a, *_ = desk.fleet.boards.values()
    a.record()
    desk.fetches.offer(a.device, a.seal(AUDIT_KIND, a.batch()))
    wait_until(lambda: desk.refusals() == {(a.device, "message.misplaced"): 1}, "the refusal")
    assert desk.frames == []


def test_a_flood_of_fetches_by_one_board(desk: Desk) -> None:
    """Fetch flood: one enrolled board asks for eight megabytes at a time, as fast as it can, for ever."""
    flooder, other, *_ = desk.fleet.boards.values()
    taken = [desk.fetches.offer(flooder.device, sealed(flooder, length=8 * 1024 * 1024)) for _ in range(10_000)]
    assert sum(taken) == PER_BOARD
    assert desk.sending.wait(20)
    assert desk.fetches.offer(other.device, sealed(other))
    wait_until(lambda: other.device in desk.fetches._to_send.boards, "the other board's turn")
    desk.go.set()
    wait_until(lambda: any(device == other.device for device, _ in desk.frames), "the other board's answer")
    place = [device for device, _ in desk.frames].index(other.device)
    assert place == 1  # behind the chunk that was on its way, and no other
    # What boards report goes its own way meanwhile.
    other.record()
    outgoing = desk.fleet.send(other, Up.AUDIT, other.batch())
    assert [topics.parse(topic).kind for topic, _ in outgoing.messages] == [Down.RECEIPT]


@pytest.mark.integration
def test_a_board_that_asks_and_goes_leaves_nothing_at_the_broker(tmp_path: Path) -> None:
    """Queue exhaustion: a board asks for megabytes and goes offline, to fill the broker's queues."""
    pki, key = FleetPki(tmp_path / "pki"), SigningKey.generate()
    content = RegistryContent(blobs={sha256_hex(b"x"): noise(2_000_000)})
    with MosquittoBroker(tmp_path / "broker", tls_config(pki, tmp_path / "broker")) as broker:
        desk = FetchDesk(content, tmp_path / "controller", pki, port=broker.port)
        desk.admit("edge-1", key)
        desk.start()
        received: list[bytes] = []
        fetch = Fetch(device="edge-1", request="0" * 16, kind=FetchKind.BLOB, sha256=sha256_hex(b"x"))
        ask = envelope.seal(FETCH_KIND, encode(fetch), key)

        def link(name: str) -> MqttLink:
            issued = pki.issue(name)
            link = MqttLink(
                address=lambda: ("127.0.0.1", broker.port),
                device=name,
                tls=lambda: client_context(pki, issued),
                protocol="5",
                keepalive_s=30,
                reconnect_max_s=0.2,
                will=lambda: b"{}",
                on_connected=lambda: None,
                on_disconnected=lambda _reason: None,
                on_message=lambda _topic, frame: received.append(frame),
            )
            link.start()
            wait_until(lambda: link.connected, f"the connection of {name}")
            return link

        try:
            first = link("edge-1")
            first.send(topics.up("edge-1", Up.FETCH), ask)
            wait_until(lambda: len(received) == 8, "the answer")
            first.stop()
            link("edge-2").stop()  # by the time that it has accepted another one, the broker knows that the first went
            # While it is away, the controller answers what it still has. The broker takes messages in their order: once
            # it has confirmed one, it has dropped, or kept, all the chunks before it.
            for _ in range(3):
                desk.bus._fetches.offer("edge-1", ask)  # type: ignore[union-attr]
            wait_until(lambda: not desk.bus._fetches._boards, "the workers")  # type: ignore[union-attr]
            place = topics.down("edge-1", Down.RECEIPT)
            desk.bus._link._client.publish(place, b"the next message", qos=1).wait_for_publish(20)
            received.clear()
            second = link("edge-1")
            wait_until(lambda: b"the next message" in received, "the next message")
            second.stop()
            assert received == [b"the next message"]
        finally:
            desk.stop()
