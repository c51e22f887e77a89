"""The board's link to the broker: one thread that connects, reads, and reconnects for ever (paho-mqtt).

The broker is never relied on. Nothing waits in this process's memory: a message that cannot leave now is refused, and
the outbox offers it again. Every attempt uses a fresh client, so nothing of a dead connection lives on in the next.
Traps of paho 2.2 that shape this module: its own reconnect doubles without jitter, keeps unbounded queues, and reuses
the old Last Will; with MQTT 5 it starts clean once per process unless told otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from garrison_protocol import topics
from garrison_protocol.envelope import MAX_ENVELOPE_BYTES
from garrison_protocol.errors import GarrisonError, InvalidError

IN_FLIGHT = 20
"""Published messages that the broker has not acknowledged; more are refused."""
SESSION_EXPIRY_S = 24 * 3600
RECONNECT_BASE_S = 1.0
STABLE_AFTER_S = 60.0
"""A connection that lived this long ends the back-off; a broker that accepts and drops us must not be hammered."""
DRAIN_S = 10.0
"""How long a connection that is to be replaced waits for acknowledgements."""
LOOP_S = 5.0
"""How often the network loop looks at its keep-alive; traffic and ``publish`` wake it at once."""

_log = logging.getLogger(__name__)
_new_properties: Callable[[int], Properties] = Properties  # paho left its constructor untyped


def full_jitter(attempt: int, max_s: float, chance: float) -> float:
    """Return the wait before ``attempt`` (from 1), spread over all of the doubled span: ``chance`` is in [0, 1)."""
    return chance * min(max_s, RECONNECT_BASE_S * 2.0 ** min(attempt, 32))


class MqttLink:
    """A session with the broker that outlives its connections.

    All callbacks run on the link's thread and must only hand over what they get. ``address``, ``tls``, and ``will`` are
    called before every attempt, since a renewal changes the certificate and may change the broker; ``will`` returns
    the sealed death for that connection's number. Each may raise a ``GarrisonError`` to skip the attempt, and must not
    wait without a limit for the thread that calls ``stop``. ``on_message`` gets messages whose
    loss is harmless (retained, or sent until answered), so they are acknowledged when it returns. An exception of
    theirs is a bug and ends the thread: let ``threading.excepthook`` end the process.
    """

    def __init__(
        self,
        *,
        address: Callable[[], tuple[str, int]],
        device: str,
        tls: Callable[[], ssl.SSLContext],
        protocol: Literal["5", "3.1.1"],
        keepalive_s: int,
        reconnect_max_s: float,
        will: Callable[[], bytes],
        on_connected: Callable[[], None],
        on_disconnected: Callable[[str], None],
        on_message: Callable[[str, bytes], None],
    ) -> None:
        self._address, self._device = address, device
        self._tls = tls
        self._version = MQTTProtocolVersion.MQTTv5 if protocol == "5" else MQTTProtocolVersion.MQTTv311
        self._keepalive_s = keepalive_s
        self._reconnect_max_s = reconnect_max_s
        self._will = will
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_message = on_message
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._renewals = 0
        self._thread: threading.Thread | None = None
        self._connection: _Connection | None = None
        self.last_error: str | None = None
        """Why the last attempt or connection ended; None while connected."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the current connection."""
        connection = self._connection
        return connection is not None and connection.accepted

    def start(self) -> None:
        """Begin to connect, in a thread of its own, until ``stop``."""
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 2.0) -> None:
        """Disconnect in order (the broker drops the Last Will), giving messages under way ``drain_s`` seconds."""
        connection = self._connection
        if connection is not None and connection.accepted:
            connection.drain(drain_s)
        self._stopping.set()
        self._wake.set()
        connection = self._connection
        if connection is not None:
            connection.client.disconnect()
        if self._thread is not None:
            self._thread.join(10)

    def reconnect(self) -> None:
        """End the connection in order and connect anew at once, with what ``address`` and ``tls`` return from now on.

        What the broker has not acknowledged is the outbox's to offer again, as after any other end of a connection.
        """
        self._renewals += 1  # before the look at the connection: an attempt that read the old pair sees one of both
        connection = self._connection
        if connection is not None:
            connection.end("reconnecting with a new certificate")
        self._wake.set()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand a message (QoS 1) to the broker; False: not now, offer it again later.

        True says nothing about delivery; only a signed receipt does. One thread publishes.

        Raises:
            InvalidError: ``envelope.too_large``; a broker's packet limit would block the connection for ever.
        """
        if len(payload) > MAX_ENVELOPE_BYTES:
            raise InvalidError("envelope.too_large", f"a payload of {len(payload)} bytes on {topic}", size=len(payload))
        connection = self._connection
        return connection is not None and connection.publish(topic, payload, retain=retain)

    def send(self, topic: str, payload: bytes) -> bool:
        """Publish once (QoS 0), from any thread: what is lost on its way is the sender's to notice. False: not now."""
        connection = self._connection
        return connection is not None and connection.send(topic, payload)

    def _run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            renewals = self._renewals
            reason, was_accepted = self._one_connection(renewals)
            if self._stopping.is_set():
                return
            again = self._renewals != renewals
            if self.last_error != reason and not again:  # an outage of weeks is one line, not one per attempt
                _log.warning("%s", reason)
            self.last_error = reason
            if was_accepted:
                self._on_disconnected(reason)
                if time.monotonic() - started >= STABLE_AFTER_S:
                    attempt = 0
            if again:
                self._wake.clear()
                continue
            attempt += 1
            self._wake.wait(full_jitter(attempt, self._reconnect_max_s, random.random()))  # noqa: S311 (no secret)
            self._wake.clear()

    def _one_connection(self, renewals: int) -> tuple[str, bool]:
        """Connect, serve until the end, and return why it ended and whether the broker had accepted us."""
        try:
            host, port = self._address()
            client = self._client(self._tls(), self._will())
        except GarrisonError as error:
            return f"no connection to the broker: {error}", False
        connection = _Connection(client, self._device, self._accepted, self._on_message)
        self._connection = connection
        try:
            if self._renewals != renewals:
                return "reconnecting with a new certificate", False
            reason = connection.serve(lambda client: self._connect(client, host, port), self._stopping)
        finally:
            self._connection = None
        return f"broker {host}:{port}: {reason}", connection.was_accepted

    def _accepted(self) -> None:
        self.last_error = None
        self._on_connected()

    def _client(self, tls: ssl.SSLContext, will: bytes) -> Client:
        version_5 = self._version is MQTTProtocolVersion.MQTTv5
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._device,
            clean_session=None if version_5 else False,
            protocol=self._version,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.tls_set_context(tls)
        client.max_inflight_messages_set(IN_FLIGHT)
        client.max_queued_messages_set(IN_FLIGHT)  # counts those in flight too: nothing can wait behind them
        client.will_set(topics.up(self._device, topics.Up.STATUS), will, qos=1, retain=True)
        return client

    def _connect(self, client: Client, host: str, port: int) -> None:
        if self._version is MQTTProtocolVersion.MQTTv5:
            properties = _new_properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            properties.ReceiveMaximum = IN_FLIGHT
            client.connect(host, port, self._keepalive_s, clean_start=False, properties=properties)
        else:
            client.connect(host, port, self._keepalive_s)


class _Connection:
    """One attempt, from the TLS handshake to its end."""

    def __init__(
        self,
        client: Client,
        device: str,
        on_accepted: Callable[[], None],
        on_message: Callable[[str, bytes], None],
    ) -> None:
        self.client = client
        self.accepted = False
        self.was_accepted = False
        self._device = device
        self._on_accepted = on_accepted
        self._on_message = on_message
        self._reason = ""
        self._ending = threading.Event()
        self._end_by = 0.0
        self._callback_failed = False
        self._handed = 0
        self._acknowledged = 0  # written by the link's thread only
        self._progress = threading.Condition()
        client.on_connect = self._connack
        client.on_disconnect = self._disconnected
        client.on_message = self._message
        client.on_publish = self._puback
        client.on_subscribe = self._suback
        client.on_log = self._logged
        # paho writes on the caller's thread unless an outside loop says that it takes care of writing; ours does.
        client.on_socket_register_write = _ignore

    def end(self, reason: str) -> None:
        """Take nothing more, and disconnect in order once the broker has acknowledged what it got. The publisher calls.

        A socket that is closed while acknowledgements come in is reset, and what it still carried may be lost.
        """
        self._reason = reason
        self._end_by = time.monotonic() + DRAIN_S
        self._ending.set()
        if self._drained():
            self.client.disconnect()

    def serve(self, connect: Callable[[Client], None], stopping: threading.Event) -> str:
        """Run the connection until it ends and return why."""
        try:
            connect(self.client)
        except (OSError, ValueError) as error:  # ValueError: a certificate that does not name the host
            return f"cannot connect: {error}"
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        disconnecting = False
        try:
            while code == MQTTErrorCode.MQTT_ERR_SUCCESS:
                # Either may have been set before there was a socket.
                wanted = stopping.is_set() or (self._ending.is_set() and self._drained())
                if wanted and not disconnecting:
                    disconnecting = True
                    self.client.disconnect()
                code = self.client.loop(LOOP_S)
        except Exception as error:
            if self._callback_failed:
                raise  # a bug of ours
            self._reason = f"the broker sent what is no MQTT: {error!r:.200}"  # paho raises whatever its parsers meet
            sock = self.client.socket()
            if sock is not None:
                sock.close()
        finally:
            self.accepted = False
            with self._progress:
                self._progress.notify_all()
        return self._reason or f"connection lost: {code.name}"

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> bool:
        if not self.accepted or self._ending.is_set() or self._handed - self._acknowledged >= IN_FLIGHT:
            return False
        return self._hand(topic, payload, 1, retain=retain)

    def send(self, topic: str, payload: bytes) -> bool:
        return self.accepted and not self._ending.is_set() and self._hand(topic, payload, 0, retain=False)

    def _hand(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> bool:
        """Publish and count it: paho reports even what needs no acknowledgement, once it is written."""
        info = self.client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        with self._progress:
            self._handed += 1
        return True

    def _drained(self) -> bool:
        return not self.accepted or self._acknowledged >= self._handed or time.monotonic() >= self._end_by

    def drain(self, timeout_s: float) -> None:
        """Wait until the broker has acknowledged all that was published, or the connection or time ends."""
        with self._progress:
            self._progress.wait_for(lambda: self._acknowledged >= self._handed or not self.accepted, timeout_s)

    def _connack(
        self, client: Client, _data: Any, _flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._reason = f"the broker refused the connection: {reason}"
            return
        limit = getattr(properties, "MaximumPacketSize", None)
        if limit is not None and limit <= MAX_ENVELOPE_BYTES:
            _log.error("the broker's packet limit of %d bytes is too low: set max_packet_size to 1048576", limit)
        down = topics.down(self._device, topics.Down.DESIRED).rpartition("/")[0]
        client.subscribe([(f"{down}/+", 1), (topics.REGISTRY_TIMESTAMP, 1)])
        self.accepted = self.was_accepted = True
        with self._ours():
            self._on_accepted()

    def _logged(self, _client: Client, _data: Any, level: int, text: str) -> None:
        """Keep why a socket failed, such as the alert that a certificate is revoked: paho says it nowhere else."""
        what, _, why = text.partition(": ")
        if level == LogLevel.MQTT_LOG_ERR and what == "failed to receive on socket" and not self._reason:
            self._reason = f"connection lost: {why}"

    def _disconnected(
        self, _client: Client, _data: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if not self._reason:
            who = "the broker ended the connection" if flags.is_disconnect_packet_from_server else "connection lost"
            self._reason = f"{who}: {reason}"

    def _message(self, client: Client, _data: Any, message: MQTTMessage) -> None:
        topic = message.topic
        with self._ours():
            self._on_message(topic, bytes(message.payload[: MAX_ENVELOPE_BYTES + 1]))  # a longer one is refused anyway
        client.ack(message.mid, message.qos)

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Tell what a callback raises from what paho does."""
        try:
            yield
        except BaseException:
            self._callback_failed = True
            raise

    def _puback(
        self, _client: Client, _data: Any, _mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            _log.warning("the broker refused a message: %s; its topic rules may not admit %s", reason, self._device)
        with self._progress:
            self._acknowledged += 1
            self._progress.notify_all()

    def _suback(
        self, _client: Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        for reason in reasons:
            if reason.is_failure:
                _log.error("the broker refused a subscription: %s", reason)


def _ignore(_client: Client, _data: Any, _socket: Any) -> None:
    return
