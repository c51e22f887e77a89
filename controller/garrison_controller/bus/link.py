"""The controller's MQTT connection: a thin layer over paho, for MQTT 5 and 3.1.1.

paho's network thread only calls the callbacks given here, which only put events on the bus's queue.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from garrison_protocol import topics
from garrison_protocol.topics import Up

SESSION_EXPIRY_S = 7 * 24 * 3600
RECEIVE_MAXIMUM = 100
IN_FLIGHT = 20
MAX_QUEUED = 1000
QOS = 1
FRAME_BYTES = 1024 * 1024
"""Frames that wait in this process for the socket: more would only delay the messages behind them."""
SEND_TIMEOUT_S = 30.0
_LOG = logging.getLogger(__name__)
_properties: Callable[[int], Properties] = Properties


@dataclass(frozen=True, slots=True)
class Inbound:
    """One message as it came; ``mid`` and ``qos`` acknowledge it."""

    topic: str
    payload: bytes
    mid: int
    qos: int


class BusLink:
    """One connection that keeps its session at the broker, and comes back by itself with random pauses."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        identity: str,
        tls: ssl.SSLContext,
        protocol: Literal["5", "3.1.1"],
        keepalive_s: int,
        on_connected: Callable[[], None],
        on_disconnected: Callable[[str], None],
        on_message: Callable[[Inbound], None],
        on_published: Callable[[int], None],
    ) -> None:
        self._host, self._port, self._keepalive_s = host, port, keepalive_s
        self._v5 = protocol == "5"
        self._on_connected, self._on_disconnected = on_connected, on_disconnected
        self._on_message, self._on_published = on_message, on_published
        self._frames: dict[int, int] = {}
        """Bytes of each frame that paho has not written yet, by message number."""
        self._room = threading.Condition()
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=identity,
            protocol=mqtt.MQTTv5 if self._v5 else mqtt.MQTTv311,
            clean_session=None if self._v5 else False,
            manual_ack=True,
        )
        self._client.tls_set_context(tls)
        self._client.max_inflight_messages_set(IN_FLIGHT)
        self._client.max_queued_messages_set(MAX_QUEUED)
        # paho doubles its pause without jitter, so that a fleet comes back in step: the bounds are drawn at random.
        self._client.reconnect_delay_set(min_delay=1, max_delay=random.randint(5, 30))  # noqa: S311 -- no secret
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._message
        self._client.on_publish = self._published

    @property
    def connected(self) -> bool:
        """Tell whether the broker has accepted the connection that stands."""
        return self._client.is_connected()

    def start(self) -> None:
        """Begin to connect, in paho's thread; returns at once, also while the broker is down."""
        if self._v5:
            properties = _properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            properties.ReceiveMaximum = RECEIVE_MAXIMUM
            # clean_start is explicit: paho's default would wipe the session whenever the process starts.
            self._client.connect_async(
                self._host, self._port, self._keepalive_s, clean_start=False, properties=properties
            )
        else:
            self._client.connect_async(self._host, self._port, self._keepalive_s)
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnect and end paho's thread. The session stays at the broker."""
        self._client.disconnect()
        self._forget_frames()  # whoever waits for room sees that there is no connection any more
        self._client.loop_stop()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int | None:
        """Queue one message and return its number for ``on_published``; None when there is no connection."""
        if not self.connected:
            return None
        info = self._client.publish(topic, payload, qos=QOS, retain=retain)
        return info.mid if info.rc == mqtt.MQTT_ERR_SUCCESS else None

    def send(self, topic: str, payload: bytes) -> bool:
        """Publish a frame once (QoS 0), when at most ``FRAME_BYTES`` wait; False: it was not sent. From any thread."""
        with self._room:
            self._room.wait_for(lambda: sum(self._frames.values()) < FRAME_BYTES or not self.connected, SEND_TIMEOUT_S)
            if sum(self._frames.values()) >= FRAME_BYTES or not self.connected:
                return False
            info = self._client.publish(topic, payload, qos=0)
            if info.rc != mqtt.MQTT_ERR_SUCCESS:
                return False
            self._frames[info.mid] = len(payload)
            return True

    def acknowledge(self, message: Inbound) -> None:
        """Tell the broker that ``message`` is committed or refused. Lost with its connection; it then comes again."""
        self._client.ack(message.mid, message.qos)

    def _connected(
        self, client: mqtt.Client, _userdata: Any, _flags: mqtt.ConnectFlags, reason: ReasonCode, _: Properties | None
    ) -> None:
        if reason.is_failure:
            _LOG.warning("the broker refused the controller: %s", reason)
            return
        self._forget_frames()
        # A fetch that waited for a controller that was away would be answered to nobody.
        client.subscribe([(topics.all_up(kind), 0 if kind is Up.FETCH else QOS) for kind in Up])
        self._on_connected()

    def _disconnected(
        self,
        _client: mqtt.Client,
        _userdata: Any,
        _flags: mqtt.DisconnectFlags,
        reason: ReasonCode,
        _: Properties | None,
    ) -> None:
        self._forget_frames()
        self._on_disconnected(str(reason))

    def _message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        self._on_message(Inbound(message.topic, bytes(message.payload), message.mid, message.qos))

    def _published(
        self, _client: mqtt.Client, _userdata: Any, mid: int, _reason: ReasonCode, _: Properties | None
    ) -> None:
        with self._room:  # `send` holds it until it has noted the number: paho may be quicker
            frame = self._frames.pop(mid, None)
            self._room.notify_all()
        if frame is None:
            self._on_published(mid)

    def _forget_frames(self) -> None:
        """paho drops what it had not written on a connection that ended."""
        with self._room:
            self._frames.clear()
            self._room.notify_all()
