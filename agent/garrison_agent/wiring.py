"""The only place that constructs adapters: from the configuration to a running agent."""

from __future__ import annotations

import logging
import queue
import random
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from garrison_agent.adapters.carried_renewal import CarriedRenewal
from garrison_agent.adapters.database import Database
from garrison_agent.adapters.device_http import DeviceHttp
from garrison_agent.adapters.enrolment_anchor import take_enrolment_anchor
from garrison_agent.adapters.mqtt import MqttLink
from garrison_agent.adapters.renewal import Carrier as RenewalCarrier
from garrison_agent.adapters.renewal import HttpCarrier, MqttCarrier, Renewal
from garrison_agent.adapters.sensors import inventory, read_sample
from garrison_agent.adapters.slots import SlotStore
from garrison_agent.adapters.systemd import notify, watchdog_interval_s
from garrison_agent.api.commands import Command
from garrison_agent.api.server import LocalApi
from garrison_agent.api.traffic import Traffic
from garrison_agent.config import AgentConfig
from garrison_agent.core.slot import Now, Slot
from garrison_agent.events import Asked, Bug, Connected, Disconnected, Message, NumbersLow, OwnerEvent, Post, Stop, Tick
from garrison_agent.identity import Identity, pin_server_ca, tidy
from garrison_agent.loop import Owner, Parts, Routes
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.anchor import Anchors, Carrier
from garrison_agent.owner.applications import Applications
from garrison_agent.owner.ballast import BallastWatch
from garrison_agent.owner.bundle_export import BundleExport, Renewals
from garrison_agent.owner.bundle_import import BundleImport
from garrison_agent.owner.cache_checks import CacheChecks
from garrison_agent.owner.certificate import Certificate, Renew
from garrison_agent.owner.commands import Commands
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.effects import Effects
from garrison_agent.owner.estimates import Estimates
from garrison_agent.owner.inbound import Inbound
from garrison_agent.owner.jobs import Jobs, Work
from garrison_agent.owner.numbers import ConnectionNumbers
from garrison_agent.owner.repeats import Repeats
from garrison_agent.owner.residency import Residency
from garrison_agent.owner.shelf import Shelf
from garrison_agent.owner.stalls import Stalls
from garrison_agent.owner.telemetry import Telemetry
from garrison_agent.owner.timekeeper import Timekeeper
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.trust import NOT_ANCHORED, Trust
from garrison_agent.owner.uplink import Uplink
from garrison_agent.owner.views import Views, registry_view
from garrison_agent.owner.work import BoardWork
from garrison_agent.owner.workers import Build, Workers
from garrison_agent.planning import context_of, default_threads, planner
from garrison_agent.registry.bundle_source import Plugged
from garrison_agent.registry.fallback_source import FallbackSource, Route, RoutedVerifier
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.http_source import HttpSource
from garrison_agent.registry.mqtt_source import MqttSource
from garrison_agent.registry.verifier import TrustVerifier
from garrison_agent.runtimes.cgroups import take_over
from garrison_agent.runtimes.process import Worker
from garrison_protocol import topics
from garrison_protocol.errors import InvalidError
from garrison_protocol.fleet import Fleet
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.fetch import FetchKind
from garrison_protocol.messages.report import Inventory, Report, Status

if TYPE_CHECKING:  # a board without upstreams does without
    from garrison_agent.api.upstreams import Upstreams

_LOG = logging.getLogger(__name__)

THIN_EVERY_S = 600.0
AUTO_MEMORY_SHARE = 0.8
MAX_INBOX = 256
"""Waiting events beyond which messages from the broker are dropped."""
MAX_SOCKET_PATH = 90
"""Bytes; a unix socket's path has room for 107."""
_MIB = 1024 * 1024


def run_agent(config: AgentConfig) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit status.

    Raises:
        NotFoundError: ``identity.not_enrolled``.
        GarrisonError: What the store, the identity, or the local API's port refuse.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    identity = Identity.load(config.state_dir)
    database = Database(config.database_path)  # first of all: its lock keeps a second agent away from our sockets
    try:
        _make_runtime_dir(config.runtime_dir)
        inbox: queue.SimpleQueue[OwnerEvent] = queue.SimpleQueue()
        owner = _build(config, identity, database, inbox)
        # SimpleQueue.put is reentrant, so a signal handler may call it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _frame: inbox.put(Stop(signal.Signals(received).name)))
        # A thread that dies of a bug (the link's, the API's) must not leave an agent that only looks alive.
        threading.excepthook = lambda failed: inbox.put(Bug(failed.exc_value or RuntimeError("a thread died")))
        owner.run()
    finally:
        database.close()
    return 0


def clock() -> Now:
    """Return this moment."""
    return Now(time.time(), time.monotonic())


def build_parts(
    *,
    config: AgentConfig,
    device: str,
    key: SigningKey,
    broker: Callable[[], str],
    renew: Renew,
    pin_server_ca: Callable[[str], bool],
    renewals: Renewals,
    plugged: Plugged,
    ask_anchor: Carrier,
    enrolment_anchor: Callable[[], tuple[str, bytes] | None],
    database: Database,
    shelf: Shelf,
    work: Work,
    build_worker: Build,
    spawn: Callable[[Callable[[], None]], None],
    post: Post,
    now: Callable[[], Now],
    board: Inventory,
) -> Parts:
    """Return the owner's parts over the given adapters."""

    def wall_s() -> float:
        return now().wall_s

    def monotonic_s() -> float:
        return now().monotonic_s

    def changed() -> None:
        routes.table = deployments.routes()
        uplink.changed()

    def status() -> Status:
        applied = inbound.applied
        return Status(
            device=device,
            connection=0,
            online=True,
            desired_counter=applied.counter,
            desired_sha256=applied.sha256,
            registry=registry_view(trust, deployments),
        )

    def report() -> Report:
        return Report(
            device=device,
            revision=1,
            aliases=deployments.reports(),
            inventory=board,
            refused=dict(inbound.refused),
        )

    def pin_cas(fleet: Fleet) -> None:
        if pin_server_ca(fleet.server_ca):
            uplink.reconnect()  # whoever answers there may be certified by the one that went

    def anchored(reopened: bool) -> None:
        repeats.begin()
        uplink.settled(reopened=reopened)
        inbound.anchored()
        if any(slot.error_code == NOT_ANCHORED for slot in deployments.slots.values()):
            deployments.nudge()

    memory_budget_mb = config.limits.memory_budget_mb or round(board.memory_mb * AUTO_MEMORY_SHARE)
    disk_reserve_bytes = config.limits.disk_reserve_mb * _MIB
    routes = Routes()
    timers = Timers(monotonic_s)
    jobs = Jobs(spawn, post)
    journal = Journal(database, device, now_ms=lambda: round(wall_s() * 1000))
    repeats = Repeats(journal, timers)
    numbers = ConnectionNumbers(database, lambda: post(NumbersLow()))
    estimates = Estimates(database, shelf, context_of(config), memory_budget_mb)
    traffic = Traffic(monotonic_s, on_busy=lambda: post(Tick.STALL), on_idle=lambda: post(Tick.IDLE))
    workers = Workers(
        config.runtime_dir / "workers",
        build_worker,
        planner(config, shelf, estimates, default_threads(config)),
        post,
        wall_s,
        estimates=estimates,
        traffic=traffic,
        budget_mb=memory_budget_mb,
    )
    residency = Residency(
        workers=workers,
        estimates=estimates,
        traffic=traffic,
        timers=timers,
        slots=lambda: deployments,
        now=now,
        budget_mb=memory_budget_mb,
        keep_alive_s=config.runtime.keep_alive_s,
        pinned=config.runtime.pinned,
    )
    stalls = Stalls(
        workers=workers,
        traffic=traffic,
        timers=timers,
        jobs=jobs,
        post=post,
        ask=work.health,
        monotonic_s=monotonic_s,
        timeout_s=config.runtime.stall_timeout_s,
    )
    timekeeper = Timekeeper(database=database, journal=journal, now=now)
    trust = Trust(database=database, journal=journal, jobs=jobs, work=work, post=post, time=timekeeper, pin=pin_cas)
    effects = Effects(
        workers=workers,
        residency=residency,
        jobs=jobs,
        work=work,
        trust=trust,
        shelf=shelf,
        journal=journal,
        timers=timers,
        post=post,
        inventory=lambda: board,
        disk_reserve_bytes=disk_reserve_bytes,
    )
    deployments = Deployments(
        database=database,
        store=SlotStore(database),
        journal=journal,
        effects=effects,
        workers=workers,
        shelf=shelf,
        timers=timers,
        now=now,
        on_change=changed,
    )
    uplink = Uplink(
        device=device,
        key=key,
        database=database,
        journal=journal,
        numbers=numbers,
        timers=timers,
        now=now,
        status=status,
        report=report,
    )
    anchors = Anchors(
        device=device,
        database=database,
        journal=journal,
        trust=trust,
        time=timekeeper,
        jobs=jobs,
        timers=timers,
        post=post,
        carrier=ask_anchor,
        enrolled=enrolment_anchor,
        refused=lambda error: inbound.refuse(error, "anchor"),
        taken=anchored,
    )
    inbound = Inbound(
        device=device,
        database=database,
        journal=journal,
        trust=trust,
        anchors=anchors,
        deployments=deployments,
        uplink=uplink,
        now=now,
    )
    telemetry = Telemetry(
        journal=journal,
        timers=timers,
        read_sample=lambda: read_sample(config.state_dir),
        monotonic_s=monotonic_s,
        max_rows=config.limits.telemetry_rows,
    )
    certificate = Certificate(
        renew=renew,
        database=database,
        journal=journal,
        jobs=jobs,
        timers=timers,
        post=post,
        judge_at_s=lambda: trust.judge_at().timestamp(),
        monotonic_s=monotonic_s,
        chance=random.random,
        reconnect=uplink.reconnect,
        device_cas=lambda: "" if trust.fleet is None else trust.fleet.device_ca,
    )
    views = Views(
        device=device,
        broker=broker,
        certificate=certificate,
        started_at=int(wall_s()),
        deployments=deployments,
        workers=workers,
        shelf=shelf,
        journal=journal,
        trust=trust,
        timekeeper=timekeeper,
        anchors=anchors,
        telemetry=telemetry,
        applied=lambda: inbound.applied,
        held=lambda: inbound.held,
        refused=lambda: inbound.refused,
        online=lambda: uplink.online,
        offline_because=lambda: uplink.offline_because,
        disk_reserve_bytes=disk_reserve_bytes,
        inventory=lambda: board,
        memory_budget_mb=memory_budget_mb,
    )
    applications = Applications(database=database, journal=journal, wall_s=wall_s, monotonic_s=monotonic_s)
    cache_checks = CacheChecks(shelf=shelf, deployments=deployments, journal=journal, jobs=jobs, work=work, post=post)
    imports = BundleImport(
        device=device,
        journal=journal,
        trust=trust,
        anchors=anchors,
        inbound=inbound,
        deployments=deployments,
        renewals=renewals,
        plugged=plugged,
        jobs=jobs,
        post=post,
        judge_at=trust.judge_at,
    )
    exports = BundleExport(
        device=device,
        database=database,
        journal=journal,
        uplink=uplink,
        anchors=anchors,
        certificate=certificate,
        renewals=renewals,
        judge_at=trust.judge_at,
    )
    commands = Commands(
        deployments=deployments,
        workers=workers,
        shelf=shelf,
        journal=journal,
        views=views,
        imports=imports,
        exports=exports,
        cache_checks=cache_checks,
        applications=applications,
        telemetry=telemetry,
        residency=residency,
    )
    return Parts(
        journal=journal,
        ballast=BallastWatch(database, journal),
        timers=timers,
        workers=workers,
        traffic=traffic,
        residency=residency,
        stalls=stalls,
        jobs=jobs,
        trust=trust,
        timekeeper=timekeeper,
        anchors=anchors,
        effects=effects,
        deployments=deployments,
        uplink=uplink,
        inbound=inbound,
        telemetry=telemetry,
        repeats=repeats,
        certificate=certificate,
        imports=imports,
        cache_checks=cache_checks,
        applications=applications,
        commands=commands,
        numbers=numbers,
        routes=routes,
    )


def _build(config: AgentConfig, identity: Identity, database: Database, inbox: queue.SimpleQueue[OwnerEvent]) -> Owner:
    post = inbox.put
    groups = take_over()
    tidy(config.state_dir)

    def judge_at() -> datetime:
        return parts.trust.judge_at()

    def server_context() -> ssl.SSLContext:
        return identity.server_context(judge_at)

    def address() -> tuple[str, int]:
        host, port = identity.broker()
        return config.mqtt.host or host, config.mqtt.port or port

    def device_cas() -> str:
        fleet = parts.trust.fleet
        return "" if fleet is None else fleet.device_ca

    shelf = Shelf(config.state_dir / "models", BlobStore(config.state_dir / "blobs"))
    verifier = TrustVerifier(config.state_dir / "registry", identity.url)
    http = DeviceHttp(identity, server_context)

    def send(topic: str, payload: bytes) -> bool:
        return link.send(topic, payload)

    over_mqtt = MqttSource(
        device=identity.device,
        key=identity.signing_key,
        send=send,
        connected=lambda: link.connected,
    )
    plugged = Plugged()
    route = Route(config.registry.source, link_up=lambda: link.connected)
    renewal_over: dict[str, RenewalCarrier] = {
        "http": HttpCarrier(identity.url, server_context),
        "mqtt": MqttCarrier(over_mqtt.ask),
    }
    parts = build_parts(
        config=config,
        device=identity.device,
        key=identity.signing_key,
        broker=lambda: "{}:{}".format(*address()),
        renew=Renewal(
            identity,
            # HTTPS in any case: an ended certificate no longer opens the broker.
            [renewal_over[carrier] for carrier in dict.fromkeys([*route.carriers, "http"])],
            device_cas,
        ),
        pin_server_ca=lambda pem: pin_server_ca(config.state_dir, pem),
        renewals=CarriedRenewal(identity),
        plugged=plugged,
        database=database,
        shelf=shelf,
        ask_anchor=lambda nonce: route.take(
            lambda: http.anchor(nonce), lambda: over_mqtt.ask(FetchKind.ANCHOR, nonce, "")
        ),
        enrolment_anchor=lambda: take_enrolment_anchor(identity.folders),
        work=BoardWork(
            RoutedVerifier(verifier, over_mqtt, route),
            FallbackSource(HttpSource(http.open), over_mqtt, route),
            shelf,
            plugged,
            over_mqtt.blamed,
        ),
        build_worker=lambda spec, on_event: Worker(spec, on_event, groups),
        spawn=_spawn,
        post=post,
        now=clock,
        board=inventory(config.state_dir),
    )

    chunks = topics.down(identity.device, topics.Down.CHUNK)

    def receive(topic: str, payload: bytes) -> None:
        if topic == chunks:
            over_mqtt.receive(payload)
        elif inbox.qsize() < MAX_INBOX:  # losing a message is harmless, holding whatever a broker sends is not
            post(Message(topic, payload))

    def connected() -> None:
        over_mqtt.reconnected()
        post(Connected())

    link = MqttLink(
        address=address,
        device=identity.device,
        tls=lambda: identity.mqtt_context(judge_at),
        protocol=config.mqtt.protocol,
        keepalive_s=config.mqtt.keepalive_s,
        reconnect_max_s=config.mqtt.reconnect_max_s,
        will=parts.uplink.will,
        on_connected=connected,
        on_disconnected=lambda reason: post(Disconnected(reason)),
        on_message=receive,
    )
    parts.uplink.attach(link)

    def ask(command: Command) -> Future[object]:
        answer: Future[object] = Future()
        post(Asked(command, answer))
        return answer

    routes = parts.routes
    api = LocalApi(
        host=config.api.host,
        port=config.api.port,
        tcp_open=config.api.tcp != "off",
        tcp_keys=config.api.tcp == "keys",
        tls=config.api.tls,
        names=config.api.names,
        request_timeout_s=config.api.request_timeout_s,
        socket=config.socket_path,
        table=lambda: routes.table,
        traffic=parts.traffic,
        applications=lambda: parts.applications.table,
        command=ask,
        upstreams=_upstreams(config, parts.deployments.slots.values()),
    )
    every = {
        Tick.SAMPLE: config.telemetry.interval_s,
        Tick.HEARTBEAT: config.telemetry.heartbeat_s,
        Tick.REFRESH: config.registry.refresh_s,
        Tick.THIN: THIN_EVERY_S,
    }
    watchdog_s = watchdog_interval_s()
    if watchdog_s is not None:
        every[Tick.WATCHDOG] = watchdog_s
    return Owner(inbox, parts, link=link, services=(api,), every=every, now=clock, notify=notify)


def _upstreams(config: AgentConfig, slots: Iterable[Slot]) -> Upstreams | None:
    """Return the configured upstreams. One that has the name of a signed model is left unused, not the model."""
    if not config.upstream:
        return None
    from garrison_agent.api.upstreams import Upstreams

    signed = {name for slot in slots for name in (slot.alias, slot.package.id, slot.package.name)}
    for clash in sorted(signed & {one.alias for one in config.upstream}):
        _LOG.error("upstream %s is not used: a signed model has this name; give it another alias in agent.toml", clash)
    return Upstreams(config.upstream)


def _spawn(work: Callable[[], None]) -> None:
    """A daemon thread: whatever it waits for, it never keeps a stopping agent alive."""
    threading.Thread(target=work, name="job", daemon=True).start()


def _make_runtime_dir(runtime_dir: Path) -> None:
    sockets = runtime_dir / "workers"
    if len(str(sockets).encode()) > MAX_SOCKET_PATH:
        raise InvalidError(
            "config.invalid",
            f"the path of runtime_dir {runtime_dir} is too long for unix sockets",
            hint=f"choose one below {MAX_SOCKET_PATH} bytes in agent.toml",
        )
    try:
        runtime_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        sockets.mkdir(mode=0o700, exist_ok=True)
        for stale in sockets.glob("*.sock"):
            stale.unlink()
    except OSError as error:
        raise InvalidError(
            "config.invalid",
            f"runtime_dir {runtime_dir} cannot be used: {error.strerror}",
            hint="make it and give it to the agent's user, or set another in agent.toml",
        ) from error
