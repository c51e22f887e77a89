"""The bus: one worker thread between the broker and the database.

paho's thread copies what comes into a bounded queue; the worker handles, publishes, then acknowledges. Desired state
is published from the database: whatever has no ``published_at`` is sent, and marked once the broker confirms it. So
the API and the tick only say that something changed, and a controller that dies at any point goes on where it was.
"""

from __future__ import annotations

import logging
import queue
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from garrison_controller.bus.fetch import Answers, Fetches
from garrison_controller.bus.ingest import Ingest
from garrison_controller.bus.link import IN_FLIGHT, BusLink, Inbound
from garrison_controller.db.base import Database
from garrison_controller.rollouts.tables import DesiredState
from garrison_protocol import topics
from garrison_protocol.errors import GarrisonError, InvalidError
from garrison_protocol.keys import SigningKey
from garrison_protocol.topics import Down, Up

INBOX = 1000
RETRY_S = 1.0
STOP_POLL_S = 0.5
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Connected:
    pass


@dataclass(frozen=True, slots=True)
class _Published:
    mid: int


@dataclass(frozen=True, slots=True)
class _Wake:
    """Look for desired state and registry notices to publish, or for the end."""


_Event = Inbound | _Connected | _Published | _Wake


class Bus:
    """Connects the controller to the broker. ``start`` and ``stop`` once each; the other methods from any thread."""

    def __init__(
        self,
        database: Database,
        *,
        host: str,
        port: int,
        identity: str,
        tls: ssl.SSLContext,
        protocol: Literal["5", "3.1.1"],
        keepalive_s: int,
        director: SigningKey,
        receipt_key: SigningKey,
        now: Callable[[], datetime],
        answers: Answers | None = None,
    ) -> None:
        """``answers``: what boards may fetch; None: nothing."""
        self._database, self._now = database, now
        self._ingest = Ingest(database, director=director, receipt_key=receipt_key, now=now)
        self._link = BusLink(
            host=host,
            port=port,
            identity=identity,
            tls=tls,
            protocol=protocol,
            keepalive_s=keepalive_s,
            on_connected=lambda: self._events.put(_Connected()),
            on_disconnected=lambda reason: _LOG.info("disconnected from the broker: %s", reason),
            on_message=self._receive,
            on_published=lambda mid: self._events.put(_Published(mid)),
        )
        self._fetches = None if answers is None else Fetches(database, answers, send=self._link.send, now=now)
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._room = threading.Semaphore(INBOX)
        self._stopping = threading.Event()
        self._timestamp: bytes | None = None
        self._timestamp_due = False
        self._lock = threading.Lock()
        self._on_the_way: dict[int, tuple[str, bytes]] = {}
        self._confirmed: list[tuple[str, bytes]] = []
        self._worker = threading.Thread(target=self._run, name="bus", daemon=True)

    @property
    def connected(self) -> bool:
        """Tell whether the controller stands at the broker."""
        return self._link.connected

    def start(self) -> None:
        """Begin to connect and to work. Returns at once, also while the broker is down."""
        self._worker.start()
        if self._fetches is not None:
            self._fetches.start()
        self._link.start()

    def stop(self) -> None:
        """End after the message at hand; what is not acknowledged comes again after the next start."""
        self._stopping.set()
        self._events.put(_Wake())
        self._worker.join()
        self._link.stop()
        if self._fetches is not None:
            self._fetches.stop()

    def desired_changed(self) -> None:
        """Publish whatever desired state is unpublished. Call it after the commit that changed it."""
        self._events.put(_Wake())

    def publish_registry_timestamp(self, timestamp: bytes) -> None:
        """Publish ``timestamp`` (the bytes of timestamp.json), retained; now, and at every new connection."""
        with self._lock:
            self._timestamp, self._timestamp_due = timestamp, True
        self._events.put(_Wake())

    def _receive(self, message: Inbound) -> None:
        if self._fetches is not None and (device := _fetching(message.topic)) is not None:
            self._fetches.offer(device, message.payload)
            self._link.acknowledge(message)
            return
        # A full inbox stops the network thread, so that TCP slows the broker: brokers overstep ReceiveMaximum.
        while not self._room.acquire(timeout=STOP_POLL_S):
            if self._stopping.is_set():
                return
        self._events.put(message)

    def _run(self) -> None:
        while not self._stopping.is_set():
            event = self._events.get()
            try:
                self._persist(event)
            finally:
                if isinstance(event, Inbound):
                    self._room.release()

    def _persist(self, event: _Event) -> None:
        """Handle ``event``, again and again while that fails: without this thread the controller would be deaf."""
        while not self._stopping.is_set():
            try:
                self._handle(event)
            except (GarrisonError, OperationalError) as error:
                _LOG.warning("the database cannot be used; trying again: %s", error)
                self._stopping.wait(RETRY_S)
            except Exception:  # noqa: BLE001 -- its end would go unnoticed: the process and its API would live on
                _LOG.exception("the bus failed; trying again")
                self._stopping.wait(RETRY_S)
            else:
                return

    def _handle(self, event: _Event) -> None:
        match event:
            case Inbound():
                outgoing = self._ingest.handle(event.topic, event.payload)
                for topic, payload in outgoing.messages:
                    self._link.publish(topic, payload)
                self._link.acknowledge(event)
                if outgoing.desired_changed:
                    self.desired_changed()
            case _Connected():
                _LOG.info("connected to the broker")
                self._on_the_way.clear()
                with self._lock:
                    self._timestamp_due = self._timestamp is not None
                self._publish_timestamp()
                self._publish_desired()
            case _Published(mid):
                confirmed = self._on_the_way.pop(mid, None)
                if confirmed is not None:
                    self._confirmed.append(confirmed)
                if self._events.empty() or len(self._confirmed) >= IN_FLIGHT:
                    self._mark_published()
                    self._publish_desired()
            case _Wake():
                self._mark_published()
                self._publish_timestamp()
                self._publish_desired()

    def _publish_timestamp(self) -> None:
        with self._lock:
            if not self._timestamp_due or self._timestamp is None:
                return
            mid = self._link.publish(topics.REGISTRY_TIMESTAMP, self._timestamp, retain=True)
            self._timestamp_due = mid is None

    def _publish_desired(self) -> None:
        """Send unpublished desired state, at most as much as may be in flight; confirmations bring the rest."""
        busy = {device for device, _ in self._on_the_way.values()} | {device for device, _ in self._confirmed}
        room = IN_FLIGHT - len(self._on_the_way)
        if room <= 0 or not self._link.connected:
            return
        statement = (
            select(DesiredState.device_id, DesiredState.envelope)
            .where(DesiredState.published_at.is_(None), DesiredState.counter > 0)
            .order_by(DesiredState.device_id)
            .limit(room + len(busy))
        )
        with self._database.reading() as session:
            due = [row for row in session.execute(statement) if row[0] not in busy]
        for device, sealed in due[:room]:
            mid = self._link.publish(topics.down(device, Down.DESIRED), sealed, retain=True)
            if mid is None:
                return
            self._on_the_way[mid] = (device, sealed)

    def _mark_published(self) -> None:
        if not self._confirmed:
            return
        now = self._now()
        with self._database.session() as session:
            for device, sealed in self._confirmed:
                # A newer one, or the same by a newer key, was signed meanwhile? Then the row stays unpublished, and
                # goes out next.
                session.execute(
                    update(DesiredState)
                    .where(DesiredState.device_id == device, DesiredState.envelope == sealed)
                    .values(published_at=now)
                )
        self._confirmed.clear()


def _fetching(topic: str) -> str | None:
    """Return the board whose fetches come on ``topic``; None for any other topic."""
    try:
        place = topics.parse(topic)
    except InvalidError:
        return None  # the worker refuses it
    return place.device if place.kind is Up.FETCH else None
