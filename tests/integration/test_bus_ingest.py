"""The controller's bus against a real Mosquitto: commits, receipts, desired state, crashes on either side."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from sqlalchemy import func, select

from garrison_controller.audit.tables import StreamRow
from garrison_controller.bus.service import Bus
from garrison_controller.devices.rotation import resign_all
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts.specification import GroupSpec
from garrison_controller.rollouts.tables import DesiredState
from garrison_protocol import envelope, topics
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import parse_message
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.streams import Receipt
from garrison_protocol.states import DeploymentState
from garrison_protocol.topics import Down, Up
from tests.fakes.broker import MosquittoBroker, tls_config
from tests.fakes.pki import FleetPki
from tests.integration.bus_crash_process import bus_of
from tests.integration.controllers import wait_until
from tests.unit.rollouts.fleet import FakeBoard, Fleet

pytestmark = pytest.mark.integration

DEADLINE_S = 20.0
EVERYONE = (GroupSpec(name="all", filter="*"),)
both_protocols = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


class BoardClient:
    """A board's connection with its own certificate; it keeps its session, and what it received."""

    def __init__(self, site: Site, board: FakeBoard) -> None:
        self.board = board
        self.messages: queue.Queue[tuple[str, bytes, bool]] = queue.Queue()
        issued = site.pki.issue(board.device)
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=board.device, protocol=mqtt.MQTTv311, clean_session=False
        )
        self._client.tls_set(str(site.pki.server_ca.pem), str(issued.cert), str(issued.key))
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe(
            [(topics.down(board.device, kind), 1) for kind in Down] + [(topics.REGISTRY_TIMESTAMP, 1)]
        )
        self._client.on_message = lambda _client, _data, message: self.messages.put(
            (message.topic, bytes(message.payload), message.retain)
        )
        self._client.connect("127.0.0.1", site.broker.port)
        self._client.loop_start()

    def publish(self, kind: Up, payload: bytes, *, retain: bool = False) -> None:
        self._client.publish(topics.up(self.board.device, kind), payload, qos=1, retain=retain)

    def next(self, kind: Down) -> tuple[bytes, bool]:
        """Return the next message of this kind and whether it was retained; others are dropped."""
        while True:
            topic, payload, retained = self.messages.get(timeout=DEADLINE_S)
            if topic == topics.down(self.board.device, kind):
                return payload, retained

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Site:
    """A broker, a controller's database with boards, and buses to start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pki = FleetPki(folder / "pki")
        self.broker = MosquittoBroker(folder / "broker", tls_config(self.pki, folder / "broker"))
        self.broker.start()
        self.fleet = Fleet(folder)
        self._buses: list[Bus] = []
        self._clients: list[BoardClient] = []
        issued = self.pki.issue("controller-1")
        self._document: dict[str, Any] = {
            "ca": str(self.pki.server_ca.pem),
            "cert": str(issued.cert),
            "key": str(issued.key),
            "database": self.fleet.database.url,
            "port": self.broker.port,
            "director": str(folder / "director.key"),
            "receipt": str(folder / "receipt.key"),
        }
        self.fleet.director.save(folder / "director.key")
        self.fleet.receipt_key.save(folder / "receipt.key")

    def document(self, protocol: str) -> dict[str, Any]:
        return self._document | {"protocol": protocol}

    def bus(self, protocol: str = "5") -> Bus:
        bus = bus_of(self.document(protocol))
        self._buses.append(bus)
        bus.start()
        wait_until(lambda: bus.connected, "the bus to connect")
        return bus

    def end(self, bus: Bus) -> None:
        self._buses.remove(bus)
        bus.stop()

    def client(self, device: str) -> BoardClient:
        client = BoardClient(self, self.fleet.boards[device])
        self._clients.append(client)
        return client

    def rows(self, device: str) -> list[int]:
        with self.fleet.database.reading() as session:
            statement = select(StreamRow.seq).where(StreamRow.device_id == device).order_by(StreamRow.seq)
            return list(session.scalars(statement))

    def receipt(self, payload: bytes, device: str) -> Receipt:
        key = self.fleet.receipt_key
        opened = envelope.unseal(payload, lambda signer: key.public_hex if signer == key.key_id else None)
        return parse_message(Receipt, opened.body, device=device)

    def desired(self, payload: bytes, device: str) -> Desired:
        key = self.fleet.director
        opened = envelope.unseal(payload, lambda signer: key.public_hex if signer == key.key_id else None)
        return parse_message(Desired, opened.body, device=device)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for bus in list(self._buses):
            self.end(bus)
        self.broker.stop()
        self.fleet.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def unpublished(site: Site) -> int:
    with site.fleet.database.reading() as session:
        statement = select(func.count()).select_from(DesiredState).where(DesiredState.published_at.is_(None))
        return session.scalar(statement) or 0


def device(site: Site, check: Callable[[Device], bool]) -> bool:
    with site.fleet.database.reading() as session:
        return check(session.get_one(Device, "edge-1"))


@both_protocols
def test_a_batch_is_committed_and_answered_with_a_signed_receipt(site: Site, protocol: str) -> None:
    site.bus(protocol)
    client = site.client("edge-1")
    for number in range(50):
        client.board.record("test", count=number)
    for first in range(1, 51, 10):
        message = client.board.seal("audit", client.board.batch(first, first + 9))
        client.publish(Up.AUDIT, message)
        client.publish(Up.AUDIT, message)
    up_to = 0
    while up_to < 50:
        payload, retained = client.next(Down.RECEIPT)
        assert not retained
        receipt = site.receipt(payload, "edge-1")
        up_to = receipt.up_to
        assert receipt.hash == client.board.entries[up_to - 1].hash
    assert site.rows("edge-1") == list(range(1, 51))
    assert site.fleet.alarms() == []


@both_protocols
def test_desired_state_reaches_boards_now_and_those_that_come_later(site: Site, protocol: str) -> None:
    bus = site.bus(protocol)
    early = site.client("edge-1")
    rollout = site.fleet.begin(groups=EVERYONE)
    bus.desired_changed()
    payload, _ = early.next(Down.DESIRED)
    assert site.desired(payload, "edge-1").aliases[0].rollout == rollout
    wait_until(lambda: unpublished(site) == 0, "the broker's confirmations")
    late = site.client("edge-2")
    payload, retained = late.next(Down.DESIRED)
    assert retained
    assert site.desired(payload, "edge-2").counter == 1


def test_desired_state_signed_by_a_new_key_goes_out_again_and_says_the_same(site: Site) -> None:
    bus = site.bus()
    client = site.client("edge-1")
    site.fleet.begin(groups=EVERYONE)
    bus.desired_changed()
    before, _ = client.next(Down.DESIRED)
    wait_until(lambda: unpublished(site) == 0, "the broker's confirmations")
    new = SigningKey.generate()
    resign_all(site.fleet.database, new)
    assert unpublished(site) > 0
    bus.desired_changed()
    after, _ = client.next(Down.DESIRED)

    assert envelope.signers(after) == (new.key_id,) != envelope.signers(before)
    opened = envelope.unseal(after, {new.key_id: new.public_hex}.get)
    assert opened.body == envelope.unseal(before, {site.fleet.director.key_id: site.fleet.director.public_hex}.get).body
    wait_until(lambda: unpublished(site) == 0, "the broker's confirmations")
    late = site.client("edge-2")
    retained, _ = late.next(Down.DESIRED)
    assert envelope.signers(retained) == (new.key_id,)
    resign_all(site.fleet.database, new)
    assert unpublished(site) == 0  # nothing is left to sign again


def test_what_changed_while_the_bus_was_away_is_published_at_the_next_start(site: Site) -> None:
    rollout = site.fleet.begin(groups=EVERYONE)
    site.fleet.pause(rollout)
    client = site.client("edge-1")
    site.bus()
    payload, _ = client.next(Down.DESIRED)
    message = site.desired(payload, "edge-1")
    assert (message.counter, message.aliases) == (2, ())


def test_reports_over_the_broker_drive_the_rollout_and_its_next_group(site: Site) -> None:
    bus = site.bus()
    rollout = site.fleet.begin()
    bus.desired_changed()
    second = site.client("edge-2")
    client = site.client("edge-1")
    client.next(Down.DESIRED)
    row = site.fleet.rollout(rollout)
    report = {
        "device": "edge-1",
        "revision": 1,
        "aliases": [
            {
                "alias": row.alias,
                "package": {
                    "name": row.package_name,
                    "version": row.package_version,
                    "manifest_sha256": row.manifest_sha256,
                },
                "rollout": rollout,
                "state": DeploymentState.ACTIVE.value,
                "step": 7,
            }
        ],
    }
    client.publish(Up.REPORT, envelope.seal("report", json.dumps(report).encode(), client.board.key))
    payload, _ = second.next(Down.DESIRED)
    assert site.desired(payload, "edge-2").aliases[0].rollout == rollout
    assert site.fleet.states(rollout)["edge-1"] == "SUCCEEDED"


@both_protocols
def test_a_controller_killed_between_commit_and_receipt_loses_and_repeats_nothing(site: Site, protocol: str) -> None:
    arguments = json.dumps(site.document(protocol))
    process = subprocess.Popen([sys.executable, "-m", "tests.integration.bus_crash_process", arguments])
    try:
        client = site.client("edge-1")
        client.board.connection = 7
        client.publish(Up.STATUS, client.board.seal("status", client.board.status()), retain=True)
        wait_until(lambda: device(site, lambda row: row.connection == 7), "the first bus to subscribe")
        client.board.record()
        client.board.record()
        client.publish(Up.AUDIT, client.board.seal("audit", client.board.batch()))
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    assert site.rows("edge-1") == [1, 2]  # committed, and nobody heard of it
    site.bus(protocol)
    receipt = site.receipt(client.next(Down.RECEIPT)[0], "edge-1")  # the broker brought the batch again
    assert (receipt.up_to, receipt.resend) == (2, False)
    assert site.rows("edge-1") == [1, 2]
    assert site.fleet.alarms() == []


def test_a_broker_that_lost_everything_is_filled_again(site: Site) -> None:
    bus = site.bus()
    site.fleet.begin(groups=EVERYONE)
    bus.desired_changed()
    bus.publish_registry_timestamp(b"timestamp 7")
    client = site.client("edge-1")
    client.next(Down.DESIRED)
    wait_until(lambda: unpublished(site) == 0, "the broker's confirmations")

    site.broker.kill()
    for path in (site.folder / "broker").glob("mosquitto.db*"):
        path.unlink()
    site.broker.start()
    wait_until(lambda: bus.connected, "the bus to come back")
    late = site.client("edge-2")
    topic, payload, _ = late.messages.get(timeout=DEADLINE_S)
    assert (topic, payload) == (topics.REGISTRY_TIMESTAMP, b"timestamp 7")
    # The retained desired state is gone; the board's status says that it has none, and it comes again.
    late.publish(Up.STATUS, late.board.seal("status", late.board.status()), retain=True)
    payload, _ = late.next(Down.DESIRED)
    assert site.desired(payload, "edge-2").counter == 1


def test_presence_follows_births_and_wills(site: Site) -> None:
    site.bus()
    client = site.client("edge-1")
    client.board.connection = 3
    client.publish(Up.STATUS, client.board.seal("status", client.board.status()), retain=True)
    wait_until(lambda: device(site, lambda row: row.online and row.connection == 3), "the birth")
    client.publish(Up.STATUS, client.board.seal("status", client.board.status(online=False)), retain=True)
    wait_until(lambda: device(site, lambda row: not row.online), "the death")


def test_a_flood_of_garbage_is_counted_and_does_not_stop_the_bus(site: Site) -> None:
    site.bus()
    client = site.client("edge-1")
    for number in range(200):
        client.publish(Up.AUDIT, b"garbage %d" % number)
    client.board.record()
    client.publish(Up.AUDIT, client.board.seal("audit", client.board.batch()))
    assert site.receipt(client.next(Down.RECEIPT)[0], "edge-1").up_to == 1
    assert site.fleet.refusals() == {("edge-1", "envelope.malformed"): 200}
