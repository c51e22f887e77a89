"""The worker processes, by alias and package: which run, which are ready, and what their words mean to a slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from garrison_agent.api.traffic import Traffic
from garrison_agent.core.estimate import Measured
from garrison_agent.core.slot import WorkerExited, WorkerFailed, WorkerReady
from garrison_agent.events import Post, WorkerSaid
from garrison_agent.owner.estimates import Estimates
from garrison_agent.runtimes.spec import WorkerSpec
from garrison_agent.runtimes.status import Exited, Failed, Ready, RequestDone, WorkerEvent
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import PackageRef

SlotWord = WorkerReady | WorkerFailed | WorkerExited
STOP_GRACE_S = 5.0
DRAIN_S = 65.0
"""For the answers that a worker is in the middle of, which it gives a minute, and for its end. New requests go to the
next worker meanwhile."""
MAX_KV_BYTES_PER_TOKEN = 1 << 30


class WorkerProcess(Protocol):
    """A child process that serves one model; ``runtimes.process.Worker`` is one.

    ``start`` and ``stop`` return at once; every ``start`` is answered by exactly one ``Exited``.
    """

    def start(self) -> None:
        """Start the child."""
        ...

    def stop(self, grace_s: float = 5.0) -> None:
        """Let the child finish its requests, for ``grace_s`` at most."""
        ...

    def kill(self) -> None:
        """End the child at once."""
        ...

    def kill_stalled(self, message: str) -> None:
        """End the child at once because it does not get on; its ``Exited`` says so."""
        ...

    def rss_mb(self) -> float | None:
        """Return its resident memory, None when it is gone."""
        ...

    def peak_mb(self) -> int | None:
        """Return the peak of its resident memory since it was ready, None when it is gone."""
        ...


Build = Callable[[WorkerSpec, Callable[[WorkerEvent], None]], WorkerProcess]
Prepare = Callable[[PackageRef, str, Path], WorkerSpec]
"""Returns what to run for a package's variant and a socket; raises GarrisonError where the disk lacks it."""


@dataclass
class _Running:
    alias: str
    package: PackageRef
    generation: int
    socket: Path
    process: WorkerProcess | None = None
    """None: it waits until an older worker of the alias has left memory."""
    variant: str = ""
    memory_mb: int = 0
    """What it is expected to take, or has taken at most."""
    tokens: int = 0
    """The context that it holds, all sequences together."""
    ready_at: float | None = None
    """Unix seconds."""
    load_ms: int = 0
    kv_bytes_per_token: int = 0
    requests: int = 0
    stopping: bool = False
    draining: bool = False
    urgent: bool = False


@dataclass(frozen=True)
class Loaded:
    """A worker that is ready: its alias, package, and what it takes."""

    generation: int
    alias: str
    package: PackageRef
    variant: str
    socket: Path
    memory_mb: int
    ready_at: float
    """Unix seconds."""
    load_ms: int


class Workers:
    """Starts and stops workers; turns their events into a slot's. Owner thread only."""

    def __init__(
        self,
        sockets: Path,
        build: Build,
        prepare: Prepare,
        post: Post,
        wall_s: Callable[[], float],
        *,
        estimates: Estimates,
        traffic: Traffic,
        budget_mb: int,
    ) -> None:
        """``sockets`` is the folder of the workers' sockets, which must exist and whose path must be short."""
        self._estimates = estimates
        self._traffic = traffic
        self._budget_mb = budget_mb
        self._sockets = sockets
        self._build = build
        self._prepare = prepare
        self._post = post
        self._wall_s = wall_s
        self._running: dict[int, _Running] = {}
        self._generation = 0

    def start(self, alias: str, package: PackageRef, variant: str, *, urgent: bool = False) -> None:
        """Start a worker, unless one is there.

        It waits for workers that are on their way out: of the same alias unless they end their answers first, of any
        where both together would take more than the budget. ``urgent``: the latter get no more time for their answers.
        """
        if self._find(alias, package) is not None:
            return
        self._generation += 1
        socket = self._sockets / f"{self._generation}.sock"
        running = _Running(alias, package, self._generation, socket, variant=variant)
        try:
            running.memory_mb = self._estimates.need_mb(package, variant)
            running.tokens = self._estimates.tokens(package, variant)
        except GarrisonError:
            pass  # what is wrong on the disk is found, and said, when it is launched
        self._running[self._generation] = running
        if not self._must_wait(running):
            self._launch(running)
        running.urgent = urgent
        self._hurry_for_the_urgent()

    def stop(self, alias: str, package: PackageRef, *, drain: bool) -> None:
        """Let the package's worker end; its slot hears no more of it.

        With ``drain`` it has ``DRAIN_S`` for the answers that it is in the middle of; else ``STOP_GRACE_S``, as have
        those of the package then that are ending their answers already.
        """
        if not drain:
            for one in self._running.values():
                if one.alias == alias and one.package == package:
                    self._hurry(one)
        running = self._find(alias, package)
        if running is None:
            return
        if running.ready_at is not None:
            self._measure(running)
        running.stopping = True
        if running.process is None:
            del self._running[running.generation]
            self._launch_waiting()
        else:
            running.draining = drain and self._traffic.look(running.socket).active > 0
            running.process.stop(DRAIN_S if running.draining else STOP_GRACE_S)
            self._hurry_for_the_urgent()

    def said(self, said: WorkerSaid) -> tuple[str, SlotWord] | None:
        """Take in what a worker said; return its alias and the slot's event, if it is one for the slot."""
        running = self._running.get(said.generation)
        if running is None:
            return None
        word: SlotWord | None = None
        match said.event:
            case RequestDone():
                running.requests += 1
            case Ready(load_ms=load_ms, rss_mb=rss_mb, metadata=metadata):
                running.ready_at = self._wall_s()
                running.load_ms = round(load_ms)
                kv = metadata.get("kv_bytes_per_token")
                running.kv_bytes_per_token = kv if isinstance(kv, int) and 0 <= kv <= MAX_KV_BYTES_PER_TOKEN else 0
                self._measure(running)
                word = WorkerReady(running.package, round(load_ms), round(rss_mb))
            case Failed(code=code, message=message):
                word = WorkerFailed(running.package, code, message)
            case Exited(returncode=returncode, code=code, message=message):
                del self._running[said.generation]
                self._traffic.forget(running.socket)
                self._launch_waiting()
                if message and running.ready_at is not None:
                    message += f"; it had taken up to {running.memory_mb} MiB"
                word = WorkerExited(running.package, -1 if returncode is None else returncode, code, message)
        return None if word is None or running.stopping else (running.alias, word)

    def owner_of(self, generation: int) -> tuple[str, PackageRef] | None:
        """Return which alias and package a worker serves, as long as it runs."""
        running = self._running.get(generation)
        return None if running is None else (running.alias, running.package)

    def socket(self, alias: str, package: PackageRef) -> Path | None:
        """Return the socket of a worker that is ready, else None."""
        running = self._find(alias, package)
        return None if running is None or running.ready_at is None else running.socket

    def rss_mb(self, alias: str, package: PackageRef) -> float | None:
        """Return the worker's resident memory in MiB, None where it does not run."""
        running = self._find(alias, package)
        return None if running is None or running.process is None else running.process.rss_mb()

    def generations(self, alias: str, package: PackageRef) -> frozenset[int]:
        """Return the processes of this package, those that are stopping too."""
        return frozenset(
            number for number, one in self._running.items() if one.alias == alias and one.package == package
        )

    def ended(self, generations: frozenset[int]) -> bool:
        """Tell whether none of these processes is left."""
        return self._running.keys().isdisjoint(generations)

    def memory_mb(self) -> list[tuple[str, PackageRef, int]]:
        """Return alias, package, and size of what is in memory or on its way there; what is leaving does not count."""
        return [(one.alias, one.package, one.memory_mb) for one in self._running.values() if not self._is_leaving(one)]

    def loaded(self) -> list[Loaded]:
        """Return the workers that are ready."""
        return [
            Loaded(
                one.generation,
                one.alias,
                one.package,
                one.variant,
                one.socket,
                one.memory_mb,
                one.ready_at,
                one.load_ms,
            )
            for one in self._running.values()
            if one.ready_at is not None and not one.stopping
        ]

    def measure(self) -> None:
        """Look at what the workers have taken so far, and keep it for the next start."""
        for running in self._running.values():
            if running.ready_at is not None:
                self._measure(running)

    def stalled(self, generation: int, message: str) -> None:
        """End a worker that does not get on; its slot hears of a crash, for this reason."""
        running = self._running.get(generation)
        if running is not None and running.process is not None:
            running.process.kill_stalled(message)

    @property
    def count(self) -> int:
        """How many processes are left."""
        return sum(one.process is not None for one in self._running.values())

    def stop_all(self, grace_s: float) -> None:
        """Let every worker end."""
        for running in list(self._running.values()):
            running.stopping = True
            if running.process is None:
                del self._running[running.generation]
            else:
                running.process.stop(grace_s)

    def kill_all(self) -> None:
        """End every worker at once."""
        for running in self._running.values():
            if running.process is not None:
                running.process.kill()

    def _find(self, alias: str, package: PackageRef) -> _Running | None:
        for one in self._running.values():
            if one.alias == alias and one.package == package and not one.stopping:
                return one
        return None

    def _hurry_for_the_urgent(self) -> None:
        """Hurry those that end their answers, where one that must not wait does not fit beside them."""
        urgent_mb = sum(one.memory_mb for one in self._running.values() if one.urgent and one.process is None)
        staying = [one for one in self._running.values() if one.draining or not self._is_leaving(one)]
        if urgent_mb and urgent_mb + sum(one.memory_mb for one in staying if one.process is not None) > self._budget_mb:
            for one in staying:
                self._hurry(one)

    def _hurry(self, one: _Running) -> None:
        if one.draining and one.process is not None:
            one.draining = False
            one.process.stop(STOP_GRACE_S)

    def _is_leaving(self, one: _Running) -> bool:
        return one.stopping or self._traffic.look(one.socket).retired

    def _must_wait(self, running: _Running) -> bool:
        leaving = [one for one in self._running.values() if self._is_leaving(one)]
        if any(one.alias == running.alias and not one.draining for one in leaving):
            return True
        launched = [one for one in self._running.values() if one.process is not None]
        return bool(leaving) and running.memory_mb + sum(one.memory_mb for one in launched) > self._budget_mb

    def _launch_waiting(self) -> None:
        for one in list(self._running.values()):
            if one.process is None and not self._must_wait(one):
                self._launch(one)

    def _measure(self, running: _Running) -> None:
        peak_mb = None if running.process is None else running.process.peak_mb()
        if peak_mb is None:
            return
        measured = Measured(peak_mb, running.tokens, running.kv_bytes_per_token, running.load_ms, running.requests > 0)
        self._estimates.learn(running.package, running.variant, measured)
        try:
            running.memory_mb = max(peak_mb, self._estimates.need_mb(running.package, running.variant))
        except GarrisonError:
            running.memory_mb = max(peak_mb, running.memory_mb)  # its manifest is being repaired

    def _launch(self, running: _Running) -> None:
        generation = running.generation

        def on_event(event: WorkerEvent) -> None:
            self._post(WorkerSaid(generation, event))

        try:
            spec = self._prepare(running.package, running.variant, running.socket)
        except GarrisonError as error:
            on_event(Failed(error.code, error.message))
            on_event(Exited(None))
            return
        running.process = self._build(spec, on_event)
        running.process.start()
