"""Attacks with a stolen certificate authority, after the fleet has replaced it: key and certificate are real."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from garrison_agent.adapters.renewal import HttpCarrier
from garrison_agent.identity import Folders, pin_server_ca
from garrison_agent.tls import pinned_context
from garrison_controller.devices import broker
from garrison_controller.devices.ca import Authority, private_pem
from garrison_controller.wiring import Controller
from garrison_protocol.errors import UnavailableError
from garrison_protocol.fleet import FLEET_TARGET, parse_fleet
from tests.attacks.door import CONNACK_ACCEPTED, connect_packet
from tests.attacks.target import Target
from tests.fakes.broker import MosquittoBroker
from tests.fakes.changed_authorities import ChangedAuthorities
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import Authority as FakeAuthority
from tests.fakes.pki import FleetPki
from tests.integration.controllers import DEADLINE_S, wait_until


def now() -> datetime:
    return datetime.now(UTC)


class PinningBoard(Target):
    """A board whose file of server CAs is the real one."""

    @property
    def server_ca(self) -> Path:
        return Folders(self.config.state_dir).server_ca

    def pin_server_ca(self, pem: str) -> bool:
        return pin_server_ca(self.config.state_dir, pem)

    def publish_server_ca(self, pem: str) -> None:
        """Let the release signers publish ``pem``, and the board see it."""
        fleet = parse_fleet(self.repository.targets[FLEET_TARGET]).model_copy(update={"server_ca": pem})
        self.repository.targets[FLEET_TARGET] = fleet.model_dump_json().encode()
        self.repository.publish()
        self.look()

    def greets(self, url: str) -> bool:
        """Tell whether the board talks to who answers there."""
        try:
            return bool(HttpCarrier(url, lambda: pinned_context(self.server_ca, now)).nonce())
        except UnavailableError:
            return False


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return FleetPki(tmp_path / "pki")


@pytest.fixture
def pinning(tmp_path: Path, pki: FleetPki) -> Iterator[PinningBoard]:
    """A board that pinned the authority that will be stolen."""
    board = PinningBoard(tmp_path / "board")
    board.settle()
    board.connect()
    board.server_ca.write_bytes(pki.server_ca.pem.read_bytes())
    yield board
    board.database.close()


@pytest.fixture
def changed(tmp_path: Path) -> ChangedAuthorities:
    return ChangedAuthorities(tmp_path)


def test_a_stolen_server_ca_before_a_board(tmp_path: Path, pki: FleetPki, pinning: PinningBoard) -> None:
    """Whoever has the old server CA's key plays controller and broker to a board, also with its own old metadata."""
    old, new = pki.server_ca.pem.read_text(), FakeAuthority(tmp_path / "new", "server-ca-2").pem.read_text()
    with DeviceApi(pki) as impostor:
        assert pinning.greets(impostor.url)
        pinning.publish_server_ca(old + new)
        both = dict(pinning.content)
        assert pinning.greets(impostor.url)
        assert pinning.link.reconnects == 0
        pinning.publish_server_ca(new)
        assert pinning.server_ca.read_text() == new
        assert pinning.link.reconnects == 1  # it leaves a broker that may be the impostor's
        impostor.requests.clear()
        assert not pinning.greets(impostor.url)
        pinning.content.clear()
        pinning.content.update(both)
        with pinning.refusing_metadata("registry.rollback"):
            pass
        assert pinning.server_ca.read_text() == new
        assert not pinning.greets(impostor.url)
        assert impostor.requests == []


def knock(changed: ChangedAuthorities, authority: Authority, name: str, folder: Path) -> bool:
    """Tell whether the broker lets in whom ``authority`` certifies as ``name``."""
    key = ec.generate_private_key(ec.SECP256R1())
    pair = folder / "pair.pem"
    pair.write_bytes(authority.issue_client(name, key.public_key(), 30, now()).pem.encode() + private_pem(key))
    context = ssl.create_default_context(cafile=str(changed.config.pki_dir / "server-ca.pem"))
    context.load_cert_chain(pair)
    raw = socket.create_connection(("127.0.0.1", changed.config.mqtt.port), timeout=DEADLINE_S)
    try:
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
            connection.sendall(connect_packet(name))
            return connection.recv(4) == CONNACK_ACCEPTED
    except (ssl.SSLError, ConnectionError):
        return False
    finally:
        raw.close()


@pytest.mark.integration
def test_a_stolen_device_ca_at_the_broker(tmp_path: Path, changed: ChangedAuthorities) -> None:
    """Whoever has the old device CA's key makes certificates for any board, and for the controller, at the broker."""
    user = "root" if os.geteuid() == 0 else ""
    conf, _ = broker.write_broker_config(changed.config, tmp_path / "broker", user=user)
    stolen, port = changed.stolen["device-ca"], changed.config.mqtt.port
    changed.introduce("device-ca")
    with MosquittoBroker(tmp_path, conf, port=port):  # with two authorities, and two lists in one file
        assert knock(changed, stolen, "edge-1", tmp_path)
        assert knock(changed, changed.authority("device-ca"), "edge-1", tmp_path)
    changed.retire("device-ca")
    with MosquittoBroker(tmp_path, conf, port=port):
        assert not knock(changed, stolen, "edge-1", tmp_path)
        assert not knock(changed, stolen, changed.config.mqtt.identity, tmp_path)
        assert knock(changed, changed.authority("device-ca"), "edge-1", tmp_path)


@pytest.mark.integration
def test_a_stolen_server_ca_before_the_controller(tmp_path: Path, changed: ChangedAuthorities) -> None:
    """Whoever has the old server CA's key plays the broker to the controller."""
    changed.introduce("server-ca")
    changed.retire("server-ca")
    user = "root" if os.geteuid() == 0 else ""
    conf, _ = broker.write_broker_config(changed.config, tmp_path / "broker", user=user)
    key = ec.generate_private_key(ec.SECP256R1())
    shown = changed.stolen["server-ca"].issue_server(["127.0.0.1"], key.public_key(), 30, now())
    (tmp_path / "shown.pem").write_text(shown.pem)
    (tmp_path / "shown.key").write_bytes(private_pem(key))
    text = conf.read_text()
    for kind in ("pem", "key"):
        text = text.replace(str(changed.config.pki_dir.resolve() / f"server.{kind}"), str(tmp_path / f"shown.{kind}"))
    impostor = tmp_path / "impostor.conf"
    impostor.write_text(text)
    controller = Controller(changed.config)
    port = changed.config.mqtt.port
    try:
        with MosquittoBroker(tmp_path / "impostor", impostor, port=port) as false:
            controller.bus.start()
            wait_until(lambda: "unknown ca" in false.log.read_text(errors="replace"), "the controller's refusal")
            assert not controller.bus.connected
            assert changed.config.mqtt.identity not in false.log.read_text(errors="replace")
        with MosquittoBroker(tmp_path / "true", conf, port=port):
            wait_until(lambda: controller.bus.connected, "the controller at its own broker")
    finally:
        controller.bus.stop()
        controller.stop()
