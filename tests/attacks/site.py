"""A real Mosquitto with the configuration that the controller writes, and clients with certificates of the real CA."""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from demo.processes import free_port
from garrison_controller.config import ControllerConfig, MqttConfig
from garrison_controller.devices import broker, pki
from garrison_controller.devices.ca import private_pem
from tests.fakes.broker import MosquittoBroker
from tests.integration.controllers import DEADLINE_S, wait_until

CONTROLLER = "controller"


class Site:
    """One broker, as ``garrison broker config`` configures it; ``port`` is where it listens."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.config = ControllerConfig(
            state_dir=folder / "state", public_url="https://127.0.0.1:8443", mqtt=MqttConfig(port=self.port)
        )
        pki.initialise(self.config, datetime.now(UTC))
        user = "root" if os.geteuid() == 0 else ""
        conf, _ = broker.write_broker_config(self.config, folder / "broker", user=user)
        self.broker = MosquittoBroker(folder, conf, port=self.port)
        self.broker.start()

    def certificate(self, name: str) -> None:
        """Write ``<name>.pem`` and ``<name>.key`` for a board."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = pki.load_authority(self.config, pki.DEVICE_CA)
        issued = authority.issue_client(name, key.public_key(), 30, datetime.now(UTC))
        (self.folder / f"{name}.pem").write_text(issued.pem)
        (self.folder / f"{name}.key").write_bytes(private_pem(key))

    @contextlib.contextmanager
    def client(self, name: str, *, will: tuple[str, bytes] | None = None) -> Iterator[Client]:
        """Give a connected client with the certificate of ``name``."""
        client = Client(self, name, will=will)
        try:
            wait_until(client.connected.is_set, f"the connection of {name}")
            yield client
        finally:
            client.close()


class Client:
    """One MQTT 5 connection that remembers what it was told."""

    def __init__(self, site: Site, name: str, *, will: tuple[str, bytes] | None = None) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.connected, self._subscribed = threading.Event(), threading.Event()
        self._published: dict[int, ReasonCode] = {}
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="ignored", protocol=mqtt.MQTTv5)
        context = ssl.create_default_context(cafile=str(site.config.pki_dir / "server-ca.pem"))
        folder = site.config.pki_dir if name == CONTROLLER else site.folder
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
        self._client.tls_set_context(context)
        if will is not None:
            self._client.will_set(will[0], will[1], qos=1, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _c, _u, message: self.received.append((message.topic, bytes(message.payload)))
        self._client.on_publish = self._on_publish
        self._client.connect("127.0.0.1", site.port)
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes = b"forged", *, retain: bool = False) -> str:
        """Return what the broker says to one message."""
        mid = self._client.publish(topic, payload, qos=1, retain=retain).mid
        wait_until(lambda: mid in self._published, f"the answer to {topic}")
        return str(self._published[mid])

    def subscribe(self, *topics: str) -> None:
        """Subscribe; a broker grants everything and then delivers what may be read."""
        self._subscribed.clear()
        self._client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])
        assert self._subscribed.wait(DEADLINE_S)

    def vanish(self) -> None:
        """Cut the connection, so that the broker publishes the Last Will."""
        raw = self._client.socket()
        assert raw is not None
        self._client.loop_stop()
        raw.close()

    def close(self) -> None:
        """Disconnect in order."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, _c: object, _u: object, _f: object, reason: ReasonCode, _p: Properties | None) -> None:
        if not reason.is_failure:
            self.connected.set()

    def _on_publish(self, _c: object, _u: object, mid: int, reason: ReasonCode, _p: Properties | None) -> None:
        self._published[mid] = reason
