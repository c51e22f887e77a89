"""Mosquitto with exactly what ``garrison broker config mosquitto`` writes, and certificates of the real CA."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from demo.fleet import find_mosquitto
from demo.processes import free_port
from garrison_controller.cli.app import main
from garrison_controller.config import ControllerConfig, MqttConfig
from garrison_controller.devices import pki
from garrison_controller.devices.ca import private_pem
from tests.integration.controllers import DEADLINE_S, wait_until

pytestmark = pytest.mark.integration


class Site:
    """A broker and the folder of certificates for its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.config = ControllerConfig(
            state_dir=folder / "state", public_url="https://127.0.0.1:8443", mqtt=MqttConfig(port=self.port)
        )
        pki.initialise(self.config, datetime.now(UTC))
        (folder / "controller.toml").write_text(
            f'state_dir = "state"\npublic_url = "https://127.0.0.1:8443"\n[mqtt]\nport = {self.port}\n'
        )
        words = ["broker", "config", "mosquitto", "--config", str(folder / "controller.toml")]
        words += ["--user", "root"] if os.geteuid() == 0 else []
        assert main([*words, "--out", str(folder / "broker")]) == 0
        conf = folder / "broker" / "mosquitto.conf"
        binary, environment = find_mosquitto()
        self.log = (folder / "broker.log").open("w")
        self.process = subprocess.Popen([binary, "-c", str(conf)], env=environment, stderr=self.log)
        wait_until(self._listens, "the broker")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def certificate(self, name: str) -> str:
        """Write ``<name>.pem`` and ``<name>.key``; return the serial number."""
        authority = pki.load_authority(self.config, pki.DEVICE_CA)
        key = ec.generate_private_key(ec.SECP256R1())
        issued = authority.issue_client(name, key.public_key(), 30, datetime.now(UTC))
        (self.folder / f"{name}.pem").write_text(issued.pem)
        (self.folder / f"{name}.key").write_bytes(private_pem(key))
        return issued.serial

    def revoke(self, serial: str) -> None:
        now = datetime.now(UTC)
        authority = pki.load_authority(self.config, pki.DEVICE_CA)
        pki.write_revocation_list(self.config.pki_dir, [authority], [(serial, now)], now)
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        self.log.close()


class Client:
    """One MQTT 5 connection that remembers what it was told."""

    def __init__(self, site: Site, name: str, *, folder: Path | None = None) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.published: dict[int, ReasonCode] = {}
        self.connected, self.subscribed = threading.Event(), threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="ignored", protocol=mqtt.MQTTv5)
        place = folder or site.folder
        context = ssl.create_default_context(cafile=str(site.config.pki_dir / "server-ca.pem"))
        context.load_cert_chain(place / f"{name}.pem", place / f"{name}.key")
        self._client.tls_set_context(context)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self.subscribed.set()
        self._client.on_message = lambda _c, _u, message: self.received.append((message.topic, bytes(message.payload)))
        self._client.on_publish = self._on_publish
        self._client.connect("127.0.0.1", site.port)
        self._client.loop_start()

    def _on_connect(self, _c: object, _u: object, _f: object, reason: ReasonCode, _p: Properties | None) -> None:
        if not reason.is_failure:
            self.connected.set()

    def _on_publish(self, _c: object, _u: object, mid: int, reason: ReasonCode, _p: Properties | None) -> None:
        self.published[mid] = reason

    def publish(self, topic: str) -> str:
        """Return what the broker says to one message."""
        mid = self._client.publish(topic, b"x", qos=1).mid
        wait_until(lambda: mid in self.published, f"the answer to {topic}")
        return str(self.published[mid])

    def subscribe(self, *topics: str) -> None:
        self.subscribed.clear()
        self._client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])
        assert self.subscribed.wait(DEADLINE_S)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.stop()


def test_each_board_has_its_own_topics_and_the_controller_all(site: Site) -> None:
    for name in ("edge-1", "edge-2"):
        site.certificate(name)
    controller = Client(site, "controller", folder=site.config.pki_dir)
    one, two = Client(site, "edge-1"), Client(site, "edge-2")
    try:
        for client in (controller, one, two):
            assert client.connected.wait(DEADLINE_S)
        controller.subscribe("garrison/v1/up/+/status")
        two.subscribe("garrison/v1/#", "garrison/v1/down/edge-1/desired", "garrison/v1/down/edge-2/desired")
        assert "Not authorized" in one.publish("garrison/v1/up/edge-2/status")
        assert "Not authorized" in one.publish("garrison/v1/down/edge-1/desired")
        assert "Not authorized" in one.publish("garrison/v1/registry/timestamp")
        assert "Not authorized" not in one.publish("garrison/v1/up/edge-1/status")
        for topic in ("down/edge-1/desired", "registry/timestamp", "down/edge-2/desired"):
            assert "Not authorized" not in controller.publish(f"garrison/v1/{topic}")
        wait_until(lambda: ("garrison/v1/down/edge-2/desired", b"x") in two.received, "edge-2's desired state")
        wait_until(lambda: bool(controller.received), "edge-1's status")
        topics = {topic for topic, _ in two.received}
        assert topics == {"garrison/v1/down/edge-2/desired", "garrison/v1/registry/timestamp"}
        assert [topic for topic, _ in controller.received] == ["garrison/v1/up/edge-1/status"]
    finally:
        for client in (controller, one, two):
            client.close()


def test_a_revoked_board_cannot_connect_again(site: Site) -> None:
    serial = site.certificate("edge-1")
    first = Client(site, "edge-1")
    assert first.connected.wait(DEADLINE_S)
    first.close()
    site.revoke(serial)

    def refused() -> bool:
        try:
            again = Client(site, "edge-1")
        except (ssl.SSLError, OSError):
            return True
        try:
            return not again.connected.wait(1)
        finally:
            again.close()

    wait_until(refused, "the broker to refuse the certificate")
