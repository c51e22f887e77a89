"""The board's link against a real Mosquitto with TLS, client certificates, and per-device topics."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from demo.processes import free_port
from garrison_agent.adapters import mqtt
from garrison_agent.adapters.mqtt import IN_FLIGHT, MqttLink, full_jitter
from garrison_agent.tls import pinned_context
from garrison_protocol import topics
from garrison_protocol.envelope import MAX_ENVELOPE_BYTES
from garrison_protocol.errors import InvalidError, UnavailableError
from garrison_protocol.topics import Down, Up
from tests.fakes.broker import MosquittoBroker, tls_config
from tests.fakes.pki import Authority, FleetPki, Issued

pytestmark = pytest.mark.integration

DEVICE = "edge-1"
STATUS = topics.up(DEVICE, Up.STATUS)
AUDIT = topics.up(DEVICE, Up.AUDIT)
DEADLINE_S = 20.0
Protocol = Literal["5", "3.1.1"]
both_protocols = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


def until(what: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def until_attempts(board: Board, count: int) -> None:
    until(lambda: board.attempts >= count)


def until_connects(board: Board, count: int) -> None:
    until(lambda: board.connects == count)


def until_received(controller: Controller, topic: str, count: int) -> None:
    until(lambda: len(controller.received(topic)) >= count)


def context(pki: FleetPki, issued: Issued, ca: Path | None = None) -> ssl.SSLContext:
    tls = ssl.create_default_context(cafile=str(ca or pki.server_ca.pem))
    tls.load_cert_chain(issued.cert, issued.key)
    return tls


class Board:
    """A link and what its callbacks were told."""

    def __init__(
        self,
        port: int,
        tls: ssl.SSLContext | Callable[[], ssl.SSLContext],
        protocol: Protocol,
        *,
        will: Callable[[], bytes] | None = None,
    ) -> None:
        self.attempts = 0
        self.connects = 0
        self.disconnects: list[str] = []
        self.messages: list[tuple[str, bytes]] = []
        self.link = MqttLink(
            address=lambda: ("127.0.0.1", port),
            device=DEVICE,
            tls=tls if callable(tls) else lambda: tls,
            protocol=protocol,
            keepalive_s=30,
            reconnect_max_s=0.2,
            will=will or self._will,
            on_connected=self._connected,
            on_disconnected=self.disconnects.append,
            on_message=lambda topic, payload: self.messages.append((topic, payload)),
        )

    def _will(self) -> bytes:
        self.attempts += 1
        return json.dumps({"death": self.attempts}).encode()

    def _connected(self) -> None:
        self.connects += 1


class Controller:
    """A plain client that sees everything and may write everything."""

    def __init__(self, port: int, tls: ssl.SSLContext) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.client = Client(CallbackAPIVersion.VERSION2, client_id="controller-1", protocol=MQTTProtocolVersion.MQTTv5)
        self.client.tls_set_context(tls)
        subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.on_message = lambda _client, _data, message: self.messages.append(
            (message.topic, bytes(message.payload))
        )
        self.client.connect("127.0.0.1", port, 30)
        self.client.loop_start()
        self.client.subscribe(f"{topics.ROOT}/up/#", 1)
        assert subscribed.wait(DEADLINE_S)

    def received(self, topic: str) -> list[bytes]:
        return [payload for name, payload in list(self.messages) if name == topic]

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self.client.publish(topic, payload, 1, retain).wait_for_publish(DEADLINE_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> FleetPki:
    return FleetPki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def issued(pki: FleetPki) -> Issued:
    return pki.issue(DEVICE)


@pytest.fixture(scope="module")
def controller_cert(pki: FleetPki) -> Issued:
    return pki.issue("controller-1")


@pytest.fixture
def broker(tmp_path: Path, pki: FleetPki) -> Iterator[MosquittoBroker]:
    folder = tmp_path / "broker"
    with MosquittoBroker(folder, tls_config(pki, folder)) as broker:
        yield broker


@pytest.fixture
def controller(broker: MosquittoBroker, pki: FleetPki, controller_cert: Issued) -> Iterator[Controller]:
    controller = Controller(broker.port, context(pki, controller_cert))
    yield controller
    controller.close()


@pytest.fixture
def start(pki: FleetPki, issued: Issued) -> Iterator[Callable[..., Board]]:
    boards: list[Board] = []

    def begin(port: int, protocol: Protocol, **more: Callable[[], bytes]) -> Board:
        board = Board(port, context(pki, issued), protocol, **more)
        boards.append(board)
        board.link.start()
        return board

    yield begin
    for board in boards:
        board.link.stop(drain_s=0)


Start = Callable[..., Board]


@both_protocols
def test_messages_go_up_and_come_down(
    broker: MosquittoBroker, controller: Controller, start: Start, protocol: Protocol
) -> None:
    controller.publish(topics.down(DEVICE, Down.DESIRED), b"desired", retain=True)
    controller.publish(topics.REGISTRY_TIMESTAMP, b"timestamp", retain=True)
    board = start(broker.port, protocol)
    until(lambda: len(board.messages) == 2)
    assert sorted(board.messages) == [
        (topics.down(DEVICE, Down.DESIRED), b"desired"),
        (topics.REGISTRY_TIMESTAMP, b"timestamp"),
    ]
    assert board.link.connected
    assert board.link.last_error is None
    assert board.link.publish(AUDIT, b"rows")
    assert board.link.publish(STATUS, b"birth", retain=True)
    until(lambda: controller.received(AUDIT) == [b"rows"] and controller.received(STATUS) == [b"birth"])
    controller.publish(topics.down(DEVICE, Down.RECEIPT), b"receipt")
    until(lambda: (topics.down(DEVICE, Down.RECEIPT), b"receipt") in board.messages)


@both_protocols
def test_a_killed_and_restarted_broker_is_found_again_with_a_new_will(
    broker: MosquittoBroker,
    pki: FleetPki,
    controller_cert: Issued,
    start: Start,
    protocol: Protocol,
) -> None:
    board = start(broker.port, protocol)
    until(lambda: board.link.connected)
    for round_number in (1, 2):
        broker.kill()
        until(lambda: not board.link.connected)
        until_attempts(board, board.attempts + 2)
        assert not board.link.publish(AUDIT, b"refused")
        broker.start()
        until_connects(board, round_number + 1)
        assert len(board.disconnects) == round_number
    fresh = Controller(broker.port, context(pki, controller_cert))
    assert board.link.publish(AUDIT, b"after")
    until(lambda: fresh.received(AUDIT) != [])
    assert fresh.received(AUDIT) == [b"after"]  # nothing that was refused waited in memory
    fresh.close()


@both_protocols
def test_the_broker_tells_of_a_death_with_the_newest_connections_will(
    broker: MosquittoBroker,
    controller: Controller,
    pki: FleetPki,
    issued: Issued,
    protocol: Protocol,
) -> None:
    class Cuttable(ssl.SSLSocket):
        """Lets the test end a connection as a lost network does: no MQTT goodbye."""

        last: Cuttable | None = None

        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            Cuttable.last = self

    tls = context(pki, issued)
    tls.sslsocket_class = Cuttable
    board = Board(broker.port, tls, protocol)
    board.link.start()
    for number in (1, 2):
        until_connects(board, number)
        assert Cuttable.last is not None
        with socket.socket(fileno=os.dup(Cuttable.last.fileno())) as wire:  # below TLS, which another thread uses
            wire.shutdown(socket.SHUT_RDWR)
        until_received(controller, STATUS, number)
    assert controller.received(STATUS)[:2] == [b'{"death": 1}', b'{"death": 2}']
    board.link.stop()


@both_protocols
def test_stop_delivers_what_is_under_way_and_leaves_no_death(
    broker: MosquittoBroker, controller: Controller, start: Start, protocol: Protocol
) -> None:
    board = start(broker.port, protocol)
    until(lambda: board.link.connected)
    assert board.link.publish(STATUS, b"goodbye", retain=True)
    board.link.stop()
    assert not board.link.connected
    assert not board.link.publish(AUDIT, b"too late")
    controller.publish(topics.up("edge-2", Up.AUDIT), b"marker")
    until(lambda: controller.received(topics.up("edge-2", Up.AUDIT)) != [])
    assert controller.received(STATUS) == [b"goodbye"]
    assert board.disconnects == []


@both_protocols
def test_nothing_queues_beyond_the_window(
    broker: MosquittoBroker, controller: Controller, start: Start, protocol: Protocol
) -> None:
    board = start(broker.port, protocol)
    until(lambda: board.link.connected)
    broker.pause()  # accepts bytes, acknowledges nothing
    taken = [board.link.publish(AUDIT, b"%d" % number) for number in range(IN_FLIGHT * 3)]
    assert taken == [True] * IN_FLIGHT + [False] * (IN_FLIGHT * 2)
    broker.resume()
    until(lambda: len(controller.received(AUDIT)) == IN_FLIGHT)
    until(lambda: board.link.publish(AUDIT, b"again"))
    until(lambda: controller.received(AUDIT)[-1] == b"again")
    assert len(controller.received(AUDIT)) == IN_FLIGHT + 1


@both_protocols
def test_the_largest_envelope_arrives_and_a_larger_one_is_refused_here(
    broker: MosquittoBroker, controller: Controller, start: Start, protocol: Protocol
) -> None:
    board = start(broker.port, protocol)
    until(lambda: board.link.connected)
    with pytest.raises(InvalidError, match=r"envelope\.too_large"):
        board.link.publish(AUDIT, bytes(MAX_ENVELOPE_BYTES + 1))
    assert all(board.link.publish(AUDIT, bytes(MAX_ENVELOPE_BYTES)) for _ in range(4))
    until(lambda: [len(payload) for payload in controller.received(AUDIT)] == [MAX_ENVELOPE_BYTES] * 4)


@both_protocols
def test_messages_for_a_killed_agent_wait_at_the_broker(
    broker: MosquittoBroker, controller: Controller, start: Start, protocol: Protocol
) -> None:
    first = start(broker.port, protocol)
    until(lambda: first.link.connected)
    first.link.stop()
    controller.publish(topics.down(DEVICE, Down.RECEIPT), b"while away")
    second = start(broker.port, protocol)
    until(lambda: (topics.down(DEVICE, Down.RECEIPT), b"while away") in second.messages)


def test_publish_before_start_and_without_a_broker_is_refused(start: Start) -> None:
    board = start(free_port(), "5")
    until(lambda: board.attempts >= 2)
    assert not board.link.connected
    assert not board.link.publish(AUDIT, b"x")
    assert "cannot connect" in (board.link.last_error or "")
    assert board.disconnects == []  # it never was connected


@both_protocols
def test_a_broker_that_speaks_no_mqtt_costs_only_the_connection(
    pki: FleetPki, start: Start, protocol: Protocol
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pki.server.cert, pki.server.key)
    accepted = b"\x20\x03\x00\x00\x00" if protocol == "5" else b"\x20\x02\x00\x00"
    bad_topic = b"\x00\x02\xff\xfe" + (b"\x00" if protocol == "5" else b"")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        board = start(listener.getsockname()[1], protocol)
        for _ in range(2):
            with tls.wrap_socket(listener.accept()[0], server_side=True) as broker:
                broker.recv(65536)
                broker.sendall(accepted)
                broker.recv(65536)  # the subscription
                broker.sendall(b"\x30" + bytes([len(bad_topic)]) + bad_topic)
                assert broker.recv(65536) == b""
    assert board.connects == 2
    assert board.messages == []
    until(lambda: bool(board.disconnects))
    assert "no MQTT" in board.disconnects[0]


# paho leaves the socket of a failed handshake to the garbage collector, which closes it and warns.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_the_pinned_ca_did_not_sign_is_never_talked_to(
    broker: MosquittoBroker, controller: Controller, pki: FleetPki, issued: Issued
) -> None:
    board = Board(broker.port, context(pki, issued, ca=pki.device_ca.pem), "5")
    board.link.start()
    until(lambda: board.attempts >= 3)
    assert "CERTIFICATE_VERIFY_FAILED" in (board.link.last_error or "")
    assert board.connects == 0
    board.link.stop()


@both_protocols
def test_a_revoked_board_keeps_trying_and_says_why(tmp_path: Path, protocol: Protocol) -> None:
    other = FleetPki(tmp_path / "pki")
    revoked = other.issue(DEVICE)
    other.device_ca.revoke(revoked.certificate)
    folder = tmp_path / "revoking"
    with MosquittoBroker(folder, tls_config(other, folder)) as broker:
        board = Board(broker.port, context(other, revoked), protocol)
        board.link.start()
        until(lambda: "certificate revoked" in (board.link.last_error or ""))
        until(lambda: board.attempts >= 3)
        assert board.connects == 0
        board.link.stop()


def test_a_will_that_cannot_be_made_skips_the_attempt(broker: MosquittoBroker, start: Start) -> None:
    asked: list[int] = []

    def will() -> bytes:
        asked.append(1)
        if len(asked) < 3:
            raise UnavailableError("owner.busy", "no connection number yet", retryable=True)
        return b"{}"

    board = start(broker.port, "5", will=will)
    until(lambda: board.link.connected)
    assert len(asked) == 3


def test_a_refused_publish_frees_its_place_in_the_window(
    broker: MosquittoBroker, controller: Controller, start: Start
) -> None:
    board = start(broker.port, "5")
    until(lambda: board.link.connected)
    for _ in range(IN_FLIGHT * 2):  # another board's topic: Mosquitto says "Not authorized"
        until(lambda: board.link.publish(topics.up("edge-2", Up.AUDIT), b"spoof"))
    until(lambda: board.link.publish(AUDIT, b"own"))
    until(lambda: controller.received(AUDIT) == [b"own"])
    assert controller.received(topics.up("edge-2", Up.AUDIT)) == []


def test_stop_while_waiting_for_the_next_attempt_returns_at_once(pki: FleetPki, issued: Issued) -> None:
    board = Board(free_port(), context(pki, issued), "5")
    board.link.start()
    until(lambda: board.link.last_error is not None)
    before = time.monotonic()
    board.link.stop()
    assert time.monotonic() - before < 5


def test_full_jitter_spreads_over_the_whole_doubling_span() -> None:
    assert full_jitter(1, 120, 0.0) == 0.0
    assert [full_jitter(attempt, 120, 1.0) for attempt in (1, 2, 3, 7, 8, 10**6)] == [2, 4, 8, 120, 120, 120]
    assert full_jitter(3, 120, 0.5) == 4
    assert mqtt.RECONNECT_BASE_S == 1.0


def judged(pki: FleetPki, issued: Issued, moment: datetime) -> ssl.SSLContext:
    tls = pinned_context(pki.server_ca.pem, lambda: moment)
    tls.load_cert_chain(issued.cert, issued.key)
    return tls


@both_protocols
def test_a_board_whose_clock_is_years_behind_connects_and_one_years_ahead_does_not(
    tmp_path: Path, protocol: Protocol
) -> None:
    soon = datetime.now(UTC) + timedelta(days=1000)
    pki = FleetPki(tmp_path / "pki")
    pki.server_ca = Authority(tmp_path / "later", "server-ca", begin=soon - timedelta(days=1))
    pki.server = pki.server_ca.issue("server", server=True, begin=soon - timedelta(days=1))
    board_cert = pki.issue(DEVICE)
    folder = tmp_path / "broker"
    with MosquittoBroker(folder, tls_config(pki, folder)) as broker:
        moment = soon + timedelta(days=90)
        board = Board(broker.port, lambda: judged(pki, board_cert, moment), protocol)
        board.link.start()
        until(lambda: board.attempts >= 3)
        assert "the server's certificate expired on" in (board.link.last_error or "")
        assert board.connects == 0
        moment = soon  # as an anchor moves the floor: the next attempt judges anew
        until_connects(board, 1)
        board.link.stop()


@both_protocols
def test_a_renewed_certificate_is_used_at_once_and_nothing_under_way_is_lost(
    tmp_path: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "full_jitter", lambda *_: 10_000.0)  # only a renewal wakes it
    pki = FleetPki(tmp_path / "pki")
    pair = [pki.issue(DEVICE, days=-1)]
    folder = tmp_path / "broker"
    with MosquittoBroker(folder, tls_config(pki, folder)) as broker:
        controller = Controller(broker.port, context(pki, pki.issue("controller-1")))
        board = Board(broker.port, lambda: judged(pki, pair[0], datetime.now(UTC)), protocol)
        board.link.start()
        until(lambda: board.link.last_error is not None)
        assert (board.attempts, board.connects) == (1, 0)  # expired: the broker refuses it
        pair[0] = pki.issue(DEVICE)
        board.link.reconnect()
        until_connects(board, 1)
        for number in range(10):
            assert board.link.publish(AUDIT, b"%d" % number)
        pair[0] = pki.issue(DEVICE)
        attempts = board.attempts
        board.link.reconnect()
        controller.publish(topics.down(DEVICE, Down.RECEIPT), b"receipt")
        until_connects(board, 2)
        assert board.attempts == attempts + 1  # without a wait, and only once
        until_received(controller, AUDIT, 10)
        assert controller.received(AUDIT) == [b"%d" % number for number in range(10)]
        until(lambda: (topics.down(DEVICE, Down.RECEIPT), b"receipt") in board.messages)
        assert not any(b"death" in payload for payload in controller.received(STATUS))  # an orderly end
        controller.close()
        board.link.stop()


def test_a_renewal_in_the_middle_of_an_attempt_is_not_missed(
    broker: MosquittoBroker, pki: FleetPki, issued: Issued
) -> None:
    used: list[int] = []
    board: Board

    def tls() -> ssl.SSLContext:
        used.append(1)
        if len(used) == 1:
            board.link.reconnect()  # the pair changes just after the old one was read
        return context(pki, issued)

    board = Board(broker.port, tls, "5")
    board.link.start()
    until_connects(board, 1)
    assert len(used) == 2
    board.link.stop()
