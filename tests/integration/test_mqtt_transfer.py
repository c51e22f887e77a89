"""Downloads over a real Mosquitto with its default queues: a killed broker, a slow link, many boards at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from garrison_agent.adapters.mqtt import MqttLink
from garrison_agent.registry.download import download_variant
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.mqtt_source import MqttSource, Patience
from garrison_controller.bus.answers import BoardAnswers
from garrison_protocol import topics
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.fetch import Fetch
from tests.fakes.broker import MosquittoBroker, tls_config
from tests.fakes.fetch_desk import FetchDesk, client_context
from tests.fakes.memory_source import RegistryContent
from tests.fakes.packages import make_package, noise
from tests.fakes.pki import FleetPki
from tests.integration.controllers import wait_until

pytestmark = pytest.mark.integration

PACKAGE = make_package(files={"model.gguf": noise(12_000_000)})
FILE = PACKAGE.variant.files[0]
BLOBS = RegistryContent(blobs=dict(PACKAGE.blobs))
Protocol = Literal["5", "3.1.1"]


class Board:
    """A board's link and source at ``port``."""

    def __init__(self, pki: FleetPki, name: str, port: int, protocol: Protocol) -> None:
        self.key = SigningKey.generate()
        issued, chunks = pki.issue(name), topics.down(name, topics.Down.CHUNK)

        def receive(topic: str, frame: bytes) -> None:
            if topic == chunks:
                self.source.receive(frame)

        def connected() -> None:
            self.source.reconnected()

        self.link = MqttLink(
            address=lambda: ("127.0.0.1", port),
            device=name,
            tls=lambda: client_context(pki, issued),
            protocol=protocol,
            keepalive_s=30,
            reconnect_max_s=0.2,
            will=lambda: b"{}",
            on_connected=connected,
            on_disconnected=lambda _reason: None,
            on_message=receive,
        )
        self.source = MqttSource(
            device=name,
            key=self.key,
            send=self.link.send,
            connected=lambda: self.link.connected,
            patience=Patience(stall_s=5, give_up_s=60),
        )

    def download(self, folder: Path, progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        download_variant(
            PACKAGE.manifest,
            PACKAGE.variant,
            self.source,
            BlobStore(folder),
            progress=progress,
            cancelled=lambda: False,
        )


class Site:
    def __init__(self, folder: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.protocol = folder, protocol
        self.pki = FleetPki(folder / "pki")
        self.broker = MosquittoBroker(folder / "broker", tls_config(self.pki, folder / "broker"))
        self.broker.start()
        self.desk = FetchDesk(BLOBS, folder / "controller", self.pki, port=self.broker.port, protocol=protocol)
        self.desk.start()
        self.asked: list[Fetch] = []
        answer = BoardAnswers.file

        def noted(answers: BoardAnswers, fetch: Fetch) -> Path:
            self.asked.append(fetch)
            return answer(answers, fetch)

        monkeypatch.setattr(BoardAnswers, "file", noted)

    @contextlib.contextmanager
    def board(self, name: str = "edge-1", *, port: int | None = None) -> Iterator[Board]:
        board = Board(self.pki, name, port or self.broker.port, self.protocol)
        self.desk.admit(name, board.key)
        board.link.start()
        wait_until(lambda: board.link.connected, f"the connection of {name}")
        try:
            yield board
        finally:
            board.link.stop()

    def asked_bytes(self) -> int:
        """How many bytes of the file were asked for."""
        return sum(min(one.length, FILE.size - one.offset) for one in self.asked if one.sha256 == FILE.sha256)


@pytest.fixture(params=["5", "3.1.1"])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path, request.param, monkeypatch)
    yield site
    site.desk.stop()
    site.broker.stop()


def test_a_download_goes_on_where_it_was_when_the_broker_was_killed(site: Site) -> None:
    killed_at: list[int] = []

    def kill_in_the_middle(done: int, total: int) -> None:
        if done > total // 3 and not killed_at:
            killed_at.append(done)
            site.asked.clear()
            site.broker.kill()
            site.broker.start()

    with site.board() as board:
        board.download(site.folder / "blobs", kill_in_the_middle)
    assert BlobStore(site.folder / "blobs").has(FILE.sha256, FILE.size)
    assert killed_at
    assert min(fetch.offset for fetch in site.asked) >= killed_at[0]


def test_a_slow_link_loses_nothing_at_the_broker(site: Site) -> None:
    with throttled(site.broker.port, bytes_per_s=6_000_000) as port, site.board(port=port) as board:
        board.download(site.folder / "blobs")
    assert BlobStore(site.folder / "blobs").has(FILE.sha256, FILE.size)
    assert site.asked_bytes() == FILE.size  # nothing was asked for twice


def test_boards_that_download_at_once_all_get_theirs(site: Site) -> None:
    with contextlib.ExitStack() as stack:
        boards = [stack.enter_context(site.board(f"edge-{number}")) for number in range(4)]
        threads = [
            threading.Thread(target=board.download, args=(site.folder / f"blobs-{number}",))
            for number, board in enumerate(boards)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(4):
        assert BlobStore(site.folder / f"blobs-{number}").has(FILE.sha256, FILE.size)


@contextlib.contextmanager
def throttled(port: int, *, bytes_per_s: int) -> Iterator[int]:
    """Give a port that leads to ``port``; what comes back from there comes no faster than ``bytes_per_s``."""
    listening = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = [listening]

    def pump(source: socket.socket, sink: socket.socket, pause_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16 * 1024):
                sink.sendall(data)
                time.sleep(pause_s * len(data))
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.socket()
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)  # so that the broker feels it
                far.connect(("127.0.0.1", port))
                open_sockets.extend((near, far))
                for pair in ((near, far, 0.0), (far, near, 1 / bytes_per_s)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listening.getsockname()[1])
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        for one in open_sockets:
            one.close()
