"""What goes up: status and report when they change, and both streams until receipts cover them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Protocol

from garrison_agent.adapters.database import Database
from garrison_agent.core.slot import Now
from garrison_agent.events import Tick
from garrison_agent.outbox.journal import Journal, ReceiptOutcome
from garrison_agent.outbox.window import SendWindow
from garrison_agent.owner.numbers import ConnectionNumbers
from garrison_agent.owner.timers import Timers
from garrison_protocol import topics
from garrison_protocol.envelope import seal
from garrison_protocol.errors import InsufficientError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import Message, encode
from garrison_protocol.messages.report import REPORT_KIND, STATUS_KIND, Head, Report, Status
from garrison_protocol.messages.streams import Batch, Receipt
from garrison_protocol.states import Stream

COALESCE_S = 0.5
"""At most two reports a second."""
SETTLE_S = 30.0
"""How long rows wait, after a start and a connect, for the anchor that tells whether their numbers are still free."""
REFUSED_RETRY_S = 0.1
"""When to offer a message again that the link did not take."""
AGENT_VERSION = version("garrison")
_log = logging.getLogger(__name__)
_REVISION = "report.revision"
_TOPICS = {Stream.AUDIT: topics.Up.AUDIT, Stream.TELEMETRY: topics.Up.TELEMETRY}
"""In the order in which they are sent."""


class Link(Protocol):
    """A session with the broker; ``adapters.mqtt.MqttLink`` is one."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the current connection."""
        ...

    @property
    def last_error(self) -> str | None:
        """Why the last attempt or connection ended; None while connected."""
        ...

    def start(self) -> None:
        """Begin to connect."""
        ...

    def stop(self) -> None:
        """Disconnect in order."""
        ...

    def reconnect(self) -> None:
        """Connect anew at once, with the board's newest certificate."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message; False: not now, offer it again later."""
        ...


class Uplink:
    """Publishes through the link. Owner thread only, but for ``will``."""

    def __init__(
        self,
        *,
        device: str,
        key: SigningKey,
        database: Database,
        journal: Journal,
        numbers: ConnectionNumbers,
        timers: Timers,
        now: Callable[[], Now],
        status: Callable[[], Status],
        report: Callable[[], Report],
    ) -> None:
        """``status`` and ``report`` give the facts; identity, time, connection, and revision are filled in here."""
        self._device = device
        self._key = key
        self._database = database
        self._journal = journal
        self._numbers = numbers
        self._timers = timers
        self._now = now
        self._status = status
        self._report = report
        self._link: Link | None = None
        self._windows = {
            stream: SendWindow.start(head.epoch, head.acked)
            for stream, head in ((Stream(name), head) for name, head in journal.heads().items())
        }
        self._revision = int(database.get(_REVISION) or 0)
        self._status_due = self._report_due = True
        self._facts: Report | None = None
        self._sealed_report = b""
        self._published_at = float("-inf")
        self._pump_at: float | None = None
        self._settled = False
        self._hold_until = float("-inf")

    def attach(self, link: Link) -> None:
        """Publish through ``link`` from now on."""
        self._link = link

    @property
    def online(self) -> bool:
        """Whether the broker can be reached now."""
        return self._link is not None and self._link.connected

    @property
    def offline_because(self) -> str:
        """Why the broker cannot be reached now; empty where it can, or nothing is known yet."""
        return "" if self._link is None or self._link.connected else self._link.last_error or ""

    def will(self) -> bytes:
        """Return the sealed death for the next connection. The link's thread calls it.

        Raises:
            UnavailableError: ``agent.busy``.
        """
        death = Status(
            device=self._device,
            connection=self._numbers.take(),
            online=False,
            agent_version=AGENT_VERSION,
            heads=self._store(),
        )
        return self._seal(STATUS_KIND, death)

    def reconnect(self) -> None:
        """Use the board's new certificate. Rows that no receipt covers are sent again then."""
        if self._link is not None:
            self._link.reconnect()

    def connected(self) -> None:
        """Begin again after the broker accepted a connection: it may have lost everything."""
        self._windows = {stream: window.connected() for stream, window in self._windows.items()}
        self._hold_until = self._now().monotonic_s + SETTLE_S
        self._status_due = self._report_due = True
        self._published_at = float("-inf")

    def settled(self, *, reopened: bool) -> None:
        """The controller has told what it has of this store: rows may go. ``reopened``: under new numbers."""
        if reopened:
            self._windows = {
                Stream(name): SendWindow.start(head.epoch, head.acked) for name, head in self._journal.heads().items()
            }
            if self.online:
                self._windows = {stream: window.connected() for stream, window in self._windows.items()}
        if reopened or not self._settled:
            self._settled = True
            self.changed()
            self._published_at = float("-inf")  # the status names the store, and goes before its rows

    def disconnected(self) -> None:
        """Send nothing until the next connection."""
        self._windows = {stream: window.disconnected() for stream, window in self._windows.items()}

    def changed(self) -> None:
        """Something that status or report tell has changed."""
        self._status_due = self._report_due = True

    def progressed(self) -> None:
        """A number in the report has changed."""
        self._report_due = True

    def received(self, receipt: Receipt) -> ReceiptOutcome:
        """Take in a receipt whose signature and device hold."""
        outcome = self._journal.acknowledge(receipt)
        if outcome not in (ReceiptOutcome.ALARM, ReceiptOutcome.WRONG_EPOCH):
            window = self._windows[receipt.stream]
            now_s = self._now().monotonic_s
            self._windows[receipt.stream] = window.received(receipt.epoch, receipt.up_to, receipt.resend, now_s)
        return outcome

    def pump_due(self) -> None:
        """A timer that ``pump`` set ran out; one that an earlier timer overtook since changes nothing.

        Otherwise each of them would set the next ones, and their number double with every time-out.
        """
        if self._pump_at is not None and self._now().monotonic_s >= self._pump_at:
            self._pump_at = None

    def pump(self) -> None:
        """Publish what is due and send what the windows allow; set a timer for the rest."""
        link = self._link
        if link is None or not link.connected:
            return
        now_s = self._now().monotonic_s
        if not self._settled and now_s >= self._hold_until:
            self.settled(reopened=False)  # nobody answers; its numbers are taken to be free
        if self._status_due or self._report_due:
            rest_s = self._published_at + COALESCE_S - now_s
            if rest_s > 0:
                self._pump_in(rest_s, now_s)
            else:
                self._publish_state(link, now_s)
        if not self._settled:
            self._pump_in(self._hold_until - now_s, now_s)
            return
        for stream, kind in _TOPICS.items():
            self._drain(link, stream, kind, now_s)

    def sealed_state(self) -> tuple[bytes, bytes]:
        """Return status and report as they would be published now, for a stick; the report may be empty."""
        self._seal_report()
        return self._seal(STATUS_KIND, self._filled(online=True)), self._sealed_report

    def sealed_batch(self, stream: Stream, after: int) -> tuple[Batch, bytes] | None:
        """Return the next rows behind number ``after`` with their envelope, for a stick; None: there are none."""
        batch = self._journal.batch(stream, after)
        return None if batch is None else (batch, self._seal(_TOPICS[stream].value, batch))

    def die(self) -> None:
        """Say that this board goes offline on purpose, so that nobody waits for the broker to notice."""
        if self._link is not None and self._link.connected:
            death = self._filled(online=False)
            self._link.publish(self._topic(topics.Up.STATUS), self._seal(STATUS_KIND, death), retain=True)

    def _publish_state(self, link: Link, now_s: float) -> None:
        if self._status_due:  # first: it may say that this store is a new one, which a report does not
            birth = self._seal(STATUS_KIND, self._filled(online=True))
            self._status_due = not link.publish(self._topic(topics.Up.STATUS), birth, retain=True)
        if self._report_due:
            self._seal_report()
            self._report_due = bool(self._sealed_report) and not link.publish(
                self._topic(topics.Up.REPORT), self._sealed_report
            )
        if self._report_due or self._status_due:
            self._pump_in(REFUSED_RETRY_S, now_s)
        else:
            self._published_at = now_s

    def _seal_report(self) -> None:
        """Bring the sealed report up to date; the same facts keep their revision, stored before it is used."""
        facts = self._report().model_copy(update={"epoch": self._windows[Stream.AUDIT].epoch})
        if facts == self._facts:
            return
        try:
            self._database.put(_REVISION, str(self._revision + 1))
        except InsufficientError as error:
            _log.error("no new report: %s. %s", error, error.hint)
            return
        self._revision += 1
        sent_at = round(self._now().wall_s * 1000)
        body = facts.model_copy(update={"revision": self._revision, "sent_at": sent_at})
        self._facts, self._sealed_report = facts, self._seal(REPORT_KIND, body)

    def _filled(self, *, online: bool) -> Status:
        update = {
            "online": online,
            "connection": self._numbers.current,
            "sent_at": round(self._now().wall_s * 1000),
            "heads": self._journal.heads() if self._settled else self._store(),
            "agent_version": AGENT_VERSION,
        }
        return self._status().model_copy(update=update)

    def _store(self) -> dict[str, Head]:
        """Return which store speaks, without a word on its rows: what an earlier one said must not count for it."""
        return {Stream.AUDIT.value: Head(epoch=self._windows[Stream.AUDIT].epoch, seq=0, hash="")}

    def _drain(self, link: Link, stream: Stream, kind: topics.Up, now_s: float) -> None:
        window = self._windows[stream].tick(now_s)
        head = self._journal.heads()[stream.value].seq
        while (after := window.next_after(head)) is not None:
            batch = self._journal.batch(stream, after)
            if batch is None:
                break  # the rest was thinned
            if not link.publish(self._topic(kind), self._seal(kind.value, batch)):
                self._pump_in(REFUSED_RETRY_S, now_s)
                break
            window = window.sent(batch.first + len(batch.rows) - 1, now_s)
        self._windows[stream] = window
        if window.deadline is not None:
            self._pump_in(window.deadline - now_s, now_s)

    def _pump_in(self, delay_s: float, now_s: float) -> None:
        if self._pump_at is None or now_s + delay_s < self._pump_at:
            self._pump_at = now_s + delay_s
            self._timers.after(delay_s, Tick.PUMP)

    def _topic(self, kind: topics.Up) -> str:
        return topics.up(self._device, kind)

    def _seal(self, kind: str, message: Message) -> bytes:
        return seal(kind, encode(message), self._key)
