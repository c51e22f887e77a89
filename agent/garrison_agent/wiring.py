"""The only place that constructs adapters: from the configuration to a running agent."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from garrison_agent.adapters.database import Database
from garrison_agent.adapters.device_http import DeviceHttp
from garrison_agent.adapters.mqtt import MqttLink
from garrison_agent.adapters.sensors import inventory, read_sample
from garrison_agent.adapters.slots import SlotStore
from garrison_agent.adapters.systemd import notify, watchdog_interval_s
from garrison_agent.api.commands import Command
from garrison_agent.api.server import LocalApi
from garrison_agent.config import AgentConfig
from garrison_agent.core.slot import Now
from garrison_agent.events import Asked, Bug, Connected, Disconnected, Message, NumbersLow, OwnerEvent, Post, Stop, Tick
from garrison_agent.identity import Identity
from garrison_agent.loop import Owner, Parts, Routes
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.ballast import BallastWatch
from garrison_agent.owner.commands import Commands
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.effects import Effects
from garrison_agent.owner.inbound import Inbound
from garrison_agent.owner.jobs import Jobs, Work
from garrison_agent.owner.numbers import ConnectionNumbers
from garrison_agent.owner.shelf import Shelf
from garrison_agent.owner.telemetry import Telemetry
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.trust import Trust
from garrison_agent.owner.uplink import Uplink
from garrison_agent.owner.views import Views
from garrison_agent.owner.work import BoardWork
from garrison_agent.owner.workers import Build, Plan, Workers
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.http_source import HttpSource
from garrison_agent.registry.verifier import TrustVerifier
from garrison_agent.runtimes.process import Worker
from garrison_agent.runtimes.spec import WorkerFile, WorkerSpec
from garrison_protocol.errors import InvalidError
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.report import Inventory, Report, Status

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
    broker: str,
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
            registry=trust.view,
        )

    def report() -> Report:
        return Report(
            device=device,
            revision=1,
            aliases=deployments.reports(),
            inventory=board,
            refused=dict(inbound.refused),
        )

    memory_budget_mb = config.limits.memory_budget_mb or round(board.memory_mb * AUTO_MEMORY_SHARE)
    disk_reserve_bytes = config.limits.disk_reserve_mb * _MIB
    routes = Routes()
    timers = Timers(monotonic_s)
    jobs = Jobs(spawn, post)
    journal = Journal(database, device, now_ms=lambda: round(wall_s() * 1000))
    numbers = ConnectionNumbers(database, lambda: post(NumbersLow()))
    workers = Workers(
        config.runtime_dir / "workers", build_worker, _planner(config, shelf, board.cpu_count), post, wall_s
    )
    trust = Trust(database=database, journal=journal, jobs=jobs, work=work, post=post, wall_s=wall_s)
    effects = Effects(
        workers=workers,
        jobs=jobs,
        work=work,
        trust=trust,
        shelf=shelf,
        journal=journal,
        timers=timers,
        post=post,
        inventory=lambda: board,
        memory_budget_mb=memory_budget_mb,
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
    inbound = Inbound(
        device=device,
        database=database,
        journal=journal,
        trust=trust,
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
    views = Views(
        device=device,
        broker=broker,
        started_at=int(wall_s()),
        deployments=deployments,
        workers=workers,
        shelf=shelf,
        journal=journal,
        trust=trust,
        telemetry=telemetry,
        applied=lambda: inbound.applied,
        refused=lambda: inbound.refused,
        online=lambda: uplink.online,
        disk_reserve_bytes=disk_reserve_bytes,
    )
    commands = Commands(
        deployments=deployments,
        workers=workers,
        shelf=shelf,
        journal=journal,
        views=views,
        memory_budget_mb=memory_budget_mb,
    )
    return Parts(
        journal=journal,
        ballast=BallastWatch(database, journal),
        timers=timers,
        workers=workers,
        jobs=jobs,
        trust=trust,
        effects=effects,
        deployments=deployments,
        uplink=uplink,
        inbound=inbound,
        telemetry=telemetry,
        commands=commands,
        numbers=numbers,
        routes=routes,
    )


def _build(config: AgentConfig, identity: Identity, database: Database, inbox: queue.SimpleQueue[OwnerEvent]) -> Owner:
    post = inbox.put
    host = config.mqtt.host or identity.mqtt_host
    port = config.mqtt.port or identity.mqtt_port
    shelf = Shelf(config.state_dir / "models", BlobStore(config.state_dir / "blobs"))
    verifier = TrustVerifier(config.state_dir / "registry", identity.url)
    parts = build_parts(
        config=config,
        device=identity.device,
        key=identity.signing_key,
        broker=f"{host}:{port}",
        database=database,
        shelf=shelf,
        work=BoardWork(verifier, HttpSource(DeviceHttp(identity).open), shelf),
        build_worker=Worker,
        spawn=_spawn,
        post=post,
        now=clock,
        board=inventory(config.state_dir),
    )

    def receive(topic: str, payload: bytes) -> None:
        if inbox.qsize() < MAX_INBOX:  # losing a message is harmless, holding whatever a broker sends is not
            post(Message(topic, payload))

    link = MqttLink(
        host=host,
        port=port,
        device=identity.device,
        tls=identity.mqtt_context(),
        protocol=config.mqtt.protocol,
        keepalive_s=config.mqtt.keepalive_s,
        reconnect_max_s=config.mqtt.reconnect_max_s,
        will=parts.uplink.will,
        on_connected=lambda: post(Connected()),
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
        tcp_open=config.api.tcp == "open",
        socket=config.socket_path,
        table=lambda: routes.table,
        command=ask,
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


def _planner(config: AgentConfig, shelf: Shelf, cores: int) -> Callable[[PackageRef, str, Path], Plan]:
    """Return how to run a package: the board's defaults, where the manifest's ``model_settings`` do not say."""
    runtime = config.runtime

    def plan(package: PackageRef, variant_name: str, socket: Path) -> Plan:
        manifest, variant = shelf.variant(package, variant_name)
        settings = variant.model_settings
        for name in ("context_length", "threads", "parallel"):
            if not isinstance(settings.get(name, 1), int):
                raise InvalidError("manifest.malformed", f"model_settings of {package.id}: {name} is no number")
        context_length = int(settings.get("context_length", runtime.context_length))
        if manifest.context_length:
            context_length = min(context_length, manifest.context_length)
        spec = WorkerSpec(
            model_id=package.id,
            engine=variant.runtime.engine,
            files=tuple(
                WorkerFile(file.path, file.sha256, file.size, shelf.blobs.path(file.sha256)) for file in variant.files
            ),
            socket=socket,
            threads=int(settings.get("threads", runtime.threads or max(1, cores - 1))),
            context_length=context_length,
            parallel=int(settings.get("parallel", runtime.parallel)),
            settings=settings,
        )
        return Plan(spec, variant.memory_mb)

    return plan


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
