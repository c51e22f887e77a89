"""How fast a board fetches a model over HTTPS and over MQTT, beside ``curl`` and ``sha256sum``.

All fetch the same file from the same real controller, in turn: over TLS with a board's session bearer, and through a
real Mosquitto with the board's certificate.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from bench.fleet import one_board
from bench.result import Budget, Findings, Measure
from demo.processes import StepError
from garrison_agent.adapters.device_http import DeviceHttp, exchange
from garrison_agent.adapters.mqtt import MqttLink
from garrison_agent.identity import Identity
from garrison_agent.registry.download import download_variant
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.http_source import HttpSource
from garrison_agent.registry.mqtt_source import MqttSource
from garrison_agent.registry.source import Source
from garrison_protocol import topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.manifest import (
    CHUNK_SIZE,
    ChoiceCase,
    Evaluation,
    Manifest,
    ModelFile,
    RuntimeSpec,
    Variant,
    pack_chunks,
)
from garrison_protocol.messages.enrolment import NonceResponse, SessionRequest, SessionResponse, session_bytes
from garrison_protocol.states import Engine

FILE_BYTES = 200_000_000
ROUNDS = 9
CONNECT_S = 20.0


def measure(folder: Path) -> Findings:
    """Return speeds in MB/s and their ratios; takes about two minutes.

    Raises:
        StepError: A process did not start.
        GarrisonError: A download failed.
    """
    with one_board(folder) as (fleet, board), _over_mqtt(Identity.load(board.state)) as mqtt:
        file = _place(fleet.state / "blobs")
        manifest = _manifest(file)
        identity = Identity.load(board.state)
        http = HttpSource(DeviceHttp(identity, lambda: identity.server_context(_now)).open)
        url = f"{identity.url}/device/v1/blobs/{file.sha256}"
        curl = ["curl", "-sS", "--fail", "--cacert", str(identity.server_ca_path)]
        curl += ["-H", f"Authorization: Bearer {_bearer(identity)}", url, "-o"]

        def fetch(source: Source, target: Path) -> None:
            download_variant(
                manifest,
                manifest.variants[0],
                source,
                BlobStore(target),
                progress=lambda _done, _total: None,
                cancelled=lambda: False,
            )

        def ours(target: Path) -> None:
            fetch(http, target)

        def ours_over_mqtt(target: Path) -> None:
            fetch(mqtt, target)

        def theirs(target: Path) -> None:
            target.mkdir()
            subprocess.run([*curl, str(target / "file")], check=True)
            found = subprocess.run(["sha256sum", str(target / "file")], check=True, capture_output=True, text=True)
            assert found.stdout.startswith(file.sha256)

        def theirs_durable(target: Path) -> None:
            theirs(target)
            subprocess.run(["sync", str(target / "file"), str(target)], check=True)

        subjects: list[Callable[[Path], None]] = [ours, theirs, theirs_durable, ours_over_mqtt]
        speeds = _in_turn(subjects, folder / "fetched")
    return Findings(
        f"{FILE_BYTES / 1e6:.0f} MB of random bytes from `garrison serve run` over TLS 1.3 with a session bearer, on"
        f" loopback, median of {ROUNDS} rounds with the order turned each time. Ours: HTTP session, every"
        f" {CHUNK_SIZE // 1024} KiB chunk and the whole file hashed, fdatasync every 64 MiB, fsync, rename, folder"
        " fsync. curl: `curl -o FILE; sha256sum FILE`, nothing synced; in the second line also `sync FILE"
        " FOLDER`. Over MQTT: the same download through Mosquitto, both connections with TLS 1.3",
        (
            _line(
                "download",
                speeds[0],
                speeds[1],
                "curl + sha256sum",
                Budget("≥ 0.8 x curl + sha256sum", 0.8, at_least=True, of_ratio=True),
            ),
            _line("download, both durable", speeds[0], speeds[2], "curl + sha256sum + sync", None),
            _line(
                "download over MQTT",
                speeds[3],
                speeds[1],
                "curl + sha256sum",
                Budget("≥ 0.5 x curl + sha256sum", 0.5, at_least=True, of_ratio=True),
            ),
        ),
    )


@contextlib.contextmanager
def _over_mqtt(identity: Identity) -> Iterator[MqttSource]:
    """Give a source over a link to the broker, as the agent wires them."""
    chunks = topics.down(identity.device, topics.Down.CHUNK)
    up = threading.Event()

    def receive(topic: str, frame: bytes) -> None:
        if topic == chunks:
            source.receive(frame)

    link = MqttLink(
        address=identity.broker,
        device=identity.device,
        tls=lambda: identity.mqtt_context(_now),
        protocol="5",
        keepalive_s=60,
        reconnect_max_s=1,
        will=lambda: b"{}",
        on_connected=up.set,
        on_disconnected=lambda _reason: None,
        on_message=receive,
    )
    source = MqttSource(
        device=identity.device, key=identity.signing_key, send=link.send, connected=lambda: link.connected
    )
    link.start()
    try:
        if not up.wait(CONNECT_S):
            raise StepError(f"the broker did not accept the board: {link.last_error}")
        yield source
    finally:
        link.stop()


def _in_turn(subjects: list[Callable[[Path], None]], folder: Path) -> list[list[float]]:
    """Return per subject the MB/s of each round; one round before warms everything up."""
    speeds: list[list[float]] = [[] for _ in subjects]
    for number in range(ROUNDS + 1):
        order = [(number + place) % len(subjects) for place in range(len(subjects))]
        for index in order:
            os.sync()  # nobody pays for what the one before left unwritten
            began_s = time.perf_counter()
            subjects[index](folder)
            seconds = time.perf_counter() - began_s
            shutil.rmtree(folder)
            if number:
                speeds[index].append(FILE_BYTES / 1e6 / seconds)
    return speeds


def _line(what: str, ours: list[float], theirs: list[float], name: str, budget: Budget | None) -> Measure:
    ratios = tuple(one / other for one, other in zip(ours, theirs, strict=True))
    return Measure(
        what,
        statistics.median(ours),
        "MB/s",
        statistics.median(theirs),
        name,
        statistics.median(ratios),
        budget,
        ratios,
    )


def _place(blobs: Path) -> ModelFile:
    """Put a file of random bytes and its chunk list where the controller keeps the blobs of published models."""
    digests, whole = [], hashlib.sha256()
    part = blobs / "bench.tmp"
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        for at in range(0, FILE_BYTES, CHUNK_SIZE):
            chunk = os.urandom(min(CHUNK_SIZE, FILE_BYTES - at))
            file.write(chunk)
            whole.update(chunk)
            digests.append(hashlib.sha256(chunk).digest())
    chunks = pack_chunks(digests)
    model = ModelFile(path="model.bin", size=FILE_BYTES, sha256=whole.hexdigest(), chunks_sha256=sha256_hex(chunks))
    for digest in (model.sha256, model.chunks_sha256):
        (blobs / "sha256" / digest[:2]).mkdir(parents=True, exist_ok=True)
    part.rename(blobs / "sha256" / model.sha256[:2] / model.sha256)
    (blobs / "sha256" / model.chunks_sha256[:2] / model.chunks_sha256).write_bytes(chunks)
    return model


def _manifest(file: ModelFile) -> Manifest:
    case = ChoiceCase(id="none", prompt="", choices=("a", "b"), expected=0)
    return Manifest(
        name="bench",
        version="1.0.0",
        alias="bench",
        display_name="Random bytes",
        publisher="bench",
        license="CC0-1.0",
        task="chat-completion",
        created_at="2026-01-01T00:00:00Z",
        variants=(Variant(name="cpu", runtime=RuntimeSpec(engine=Engine.LLAMA_CPP), files=(file,), memory_mb=0),),
        evaluation=Evaluation(cases=(case,), min_accuracy=0),
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _bearer(identity: Identity) -> str:
    """Return a session token for curl, bought as the agent buys its own."""
    context = identity.server_context(_now)
    nonce = exchange(identity.url, context, "/device/v1/nonce", NonceResponse).nonce
    proof = identity.signing_key.sign(session_bytes(identity.device, nonce)).hex()
    asked = SessionRequest(device=identity.device, nonce=nonce, proof=proof)
    return exchange(identity.url, context, "/device/v1/session", SessionResponse, asked).token
