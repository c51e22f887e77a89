"""The owner thread: one queue, one reader, one owner of every state (docs/architecture.md, "Agent").

Nothing here polls: between events the thread sleeps until the next timer.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from garrison_agent.api.routes import RouteTable
from garrison_agent.api.traffic import Traffic
from garrison_agent.core.slot import Now, Phase
from garrison_agent.events import (
    AnchorAnswered,
    Asked,
    Bug,
    BundleRead,
    CacheChecked,
    CertificateTried,
    Connected,
    Disconnected,
    HealthSeen,
    Message,
    MetadataChecked,
    NumbersLow,
    OwnerEvent,
    Progress,
    SlotEvent,
    Stop,
    Tick,
    WorkerSaid,
)
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.anchor import Anchors
from garrison_agent.owner.applications import Applications
from garrison_agent.owner.ballast import BallastWatch
from garrison_agent.owner.bundle_import import BundleImport
from garrison_agent.owner.cache_checks import CacheChecks
from garrison_agent.owner.certificate import Certificate
from garrison_agent.owner.commands import Commands
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.effects import Effects
from garrison_agent.owner.inbound import Inbound
from garrison_agent.owner.jobs import Jobs
from garrison_agent.owner.numbers import ConnectionNumbers
from garrison_agent.owner.repeats import Repeats
from garrison_agent.owner.residency import Residency
from garrison_agent.owner.stalls import Stalls
from garrison_agent.owner.telemetry import Telemetry
from garrison_agent.owner.timekeeper import Timekeeper
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.trust import Trust
from garrison_agent.owner.uplink import AGENT_VERSION, Link, Uplink
from garrison_agent.owner.workers import Workers
from garrison_agent.runtimes.status import RequestDone
from garrison_protocol.errors import InsufficientError, UnavailableError
from garrison_protocol.states import Stream

WORKER_GRACE_S = 3.0
STOP_S = 8.0
"""An orderly end takes at most this long, then what is left is killed."""

_log = logging.getLogger(__name__)


class Service(Protocol):
    """Something that runs beside the owner: the local API."""

    def start(self) -> None:
        """Begin, and return when it runs."""
        ...

    def stop(self) -> None:
        """End; may block for a few seconds."""
        ...


class Routes:
    """The routing snapshot that requests read: one reference, swapped whole."""

    def __init__(self) -> None:
        self.table = RouteTable()


@dataclass(frozen=True)
class Parts:
    """Everything the owner thread owns. ``wiring`` builds it."""

    journal: Journal
    ballast: BallastWatch
    timers: Timers
    workers: Workers
    traffic: Traffic
    residency: Residency
    stalls: Stalls
    jobs: Jobs
    trust: Trust
    timekeeper: Timekeeper
    anchors: Anchors
    effects: Effects
    deployments: Deployments
    uplink: Uplink
    inbound: Inbound
    telemetry: Telemetry
    repeats: Repeats
    certificate: Certificate
    imports: BundleImport
    cache_checks: CacheChecks
    applications: Applications
    commands: Commands
    numbers: ConnectionNumbers
    routes: Routes


class Owner:
    """Reads the queue and hands each event to the part that owns what it changes."""

    def __init__(
        self,
        inbox: queue.SimpleQueue[OwnerEvent],
        parts: Parts,
        *,
        link: Link,
        services: tuple[Service, ...],
        every: Mapping[Tick, float],
        now: Callable[[], Now],
        notify: Callable[[str], object],
    ) -> None:
        """``services`` start after the models were asked for, in order.

        ``every`` gives ticks and their periods in seconds, by the monotonic clock; ``notify`` is sd_notify.
        """
        self._inbox = inbox
        self._parts = parts
        self._link = link
        self._services = services
        self._every = every
        self._now = now
        self._notify = notify

    def run(self) -> None:
        """Start everything, handle events until ``Stop``, and end in order.

        Raises:
            Exception: A bug, or a write that failed. The process must end; systemd starts it again, and every saved
                state has a resume point.
        """
        self.start()
        while True:
            event = self._next()
            if isinstance(event, Stop):
                break
            if event is not None:
                self.handle(event)
        self.stop(event.reason)

    def start(self) -> None:
        """Take up every alias from the disk, then begin to serve and to connect."""
        parts = self._parts
        parts.journal.append(Stream.AUDIT, "agent.started", {"version": AGENT_VERSION})
        _unless_full(parts.ballast.look)
        self._judge_leases()  # first: what may not serve is not even loaded
        parts.deployments.resume()
        parts.routes.table = parts.deployments.routes()
        parts.trust.look()
        parts.repeats.begin()
        for service in self._services:
            service.start()
        self._link.start()
        _unless_full(parts.certificate.look)
        for tick, period_s in self._every.items():
            parts.timers.after(period_s, tick)
        self._notify(f"READY=1\nSTATUS={self._summary()}")

    def _next(self) -> OwnerEvent | None:
        due = self._parts.timers.due()
        if due is not None:
            return due
        try:
            return self._inbox.get(timeout=self._parts.timers.next_s())
        except queue.Empty:
            return None

    def handle(self, event: OwnerEvent) -> None:
        """Apply one event to the part that it is for, and let the others look at what came of it."""
        self._dispatch(event)
        _unless_full(self._parts.ballast.look)
        _unless_full(self._parts.imports.settle)
        self._parts.commands.settle()
        self._parts.residency.settle()
        self._parts.uplink.pump()

    def _dispatch(self, event: OwnerEvent) -> None:
        parts = self._parts
        match event:
            case SlotEvent(alias, slot_event):
                parts.deployments.deliver(alias, slot_event)
            case WorkerSaid():
                self._worker_said(event)
            case HealthSeen():
                parts.stalls.seen(event)
            case Progress():
                parts.deployments.progressed(event)
                parts.uplink.progressed()
            case Message():
                parts.inbound.handle(event)
            case MetadataChecked():
                self._metadata_checked(event)
            case BundleRead():
                _unless_full(lambda: parts.imports.read(event))
            case CacheChecked():
                parts.cache_checks.finished(event)
            case AnchorAnswered():
                parts.anchors.answered(event)
                self._judge_leases()
            case CertificateTried():
                _unless_full(lambda: parts.certificate.tried(event))
            case Asked():
                parts.commands.handle(event)
            case Connected():
                parts.uplink.connected()
                parts.anchors.ask()
                parts.trust.refresh()
                parts.deployments.nudge()
            case Disconnected():
                parts.uplink.disconnected()
            case NumbersLow():
                _unless_full(parts.numbers.reserve)
            case Tick():
                self._tick(event)
            case Bug(error):
                raise error
            case Stop():
                raise AssertionError("Stop ends the loop")

    def _worker_said(self, event: WorkerSaid) -> None:
        parts = self._parts
        if isinstance(event.event, RequestDone):
            parts.workers.said(event)
            parts.applications.request_done(event.event.record)
            served = parts.workers.owner_of(event.generation)
            if served is not None:
                parts.telemetry.request_done(served[0], served[1].id, event.event.record)
            return
        word = parts.workers.said(event)
        if word is not None:
            parts.deployments.deliver(*word)

    def _metadata_checked(self, event: MetadataChecked) -> None:
        parts = self._parts
        before = parts.trust.view
        for alias, answer in parts.trust.checked(event, parts.effects.admitted).items():
            parts.deployments.deliver(alias, answer)
        parts.anchors.metadata_checked()
        parts.inbound.metadata_checked(event.error)
        self._judge_leases()
        if parts.trust.view != before:
            parts.uplink.changed()
            if event.error is None:
                parts.deployments.nudge()
        parts.imports.metadata_checked(event.error)
        _unless_full(parts.certificate.metadata_checked)

    def _judge_leases(self) -> None:
        parts = self._parts
        parts.deployments.judge_leases(fresh_at_s=parts.trust.fresh_at_s, now_s=parts.timekeeper.now_s())

    def _tick(self, tick: Tick) -> None:
        parts = self._parts
        if tick in self._every:
            parts.timers.after(self._every[tick], tick)
        match tick:
            case Tick.IDLE:
                parts.residency.due()
            case Tick.STALL:
                parts.stalls.look()
            case Tick.SAMPLE:
                parts.workers.measure()
                loaded = [slot.alias for slot in parts.deployments.slots.values() if slot.phase is Phase.READY]
                _unless_full(lambda: parts.telemetry.sample(online=parts.uplink.online, loaded=loaded))
            case Tick.SEGMENT:
                _unless_full(parts.telemetry.write_segment)
            case Tick.ANCHOR:
                parts.anchors.retry_due()
            case Tick.REPEAT:
                parts.repeats.due()
            case Tick.CERTIFICATE:
                _unless_full(parts.certificate.look)
            case Tick.HEARTBEAT:
                self._judge_leases()
                parts.uplink.changed()
                _unless_full(parts.certificate.look)  # time may have jumped, by the clock or by an anchor
                _unless_full(parts.inbound.count)
                parts.inbound.beat()
                if parts.uplink.online and parts.trust.last_error is not None:
                    parts.trust.refresh()  # the broker answers but the registry did not: ask again, at this pace
                self._notify(f"STATUS={self._summary()}")
            case Tick.REFRESH:
                parts.trust.refresh()
            case Tick.THIN:
                _unless_full(parts.telemetry.thin)
                _unless_full(parts.ballast.restore)
                _unless_full(parts.timekeeper.keep)
            case Tick.WATCHDOG:
                self._notify("WATCHDOG=1")
            case Tick.PUMP:
                parts.uplink.pump_due()
            case Tick.SOAK:
                parts.deployments.soak()

    def _summary(self) -> str:
        slots = self._parts.deployments.slots.values()
        serving = sum(slot.phase is Phase.READY for slot in slots)
        where = "online" if self._parts.uplink.online else "offline"
        return f"{where}, {serving} of {sum(slot.serving is not None for slot in slots)} models loaded"

    def stop(self, reason: str) -> None:
        """End in order within ``STOP_S``: record it, say goodbye, let requests finish, leave no process behind."""
        parts = self._parts
        deadline_s = self._now().monotonic_s + STOP_S
        self._notify("STOPPING=1")
        parts.jobs.cancel_all()
        parts.imports.stop()
        parts.cache_checks.stop()
        parts.commands.stop()
        _unless_full(parts.telemetry.write_segment)
        _unless_full(parts.inbound.count)
        _unless_full(lambda: parts.timekeeper.keep(ending=True))
        parts.journal.append(Stream.AUDIT, "agent.stopped", {"reason": reason})
        parts.uplink.pump()
        parts.uplink.die()
        parts.workers.stop_all(WORKER_GRACE_S)
        ends = [threading.Thread(target=part.stop, daemon=True) for part in (self._link, *reversed(self._services))]
        for end in ends:
            end.start()
        self._await_workers(deadline_s)
        for end in ends:
            end.join(max(0.0, deadline_s - self._now().monotonic_s))

    def _await_workers(self, deadline_s: float) -> None:
        """Hear the workers out; requests that end now still count, but come too late for this run's record."""
        workers = self._parts.workers
        while workers.count and (rest_s := deadline_s - self._now().monotonic_s) > 0:
            try:
                event = self._inbox.get(timeout=rest_s)
            except queue.Empty:
                break
            if isinstance(event, WorkerSaid):
                workers.said(event)
            elif isinstance(event, Asked) and event.answer.set_running_or_notify_cancel():
                event.answer.set_exception(UnavailableError("agent.stopping", "the agent is stopping", retryable=True))
        workers.kill_all()


def _unless_full(write: Callable[[], None]) -> None:
    """Do without while the disk is full. Only for what is no decision: those are never dropped."""
    try:
        write()
    except InsufficientError as error:
        _log.error("%s. %s", error, error.hint)
