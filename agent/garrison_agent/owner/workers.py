"""The worker processes, by alias and package: which run, which are ready, and what their words mean to a slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from garrison_agent.core.residency import Resident
from garrison_agent.core.slot import WorkerExited, WorkerFailed, WorkerReady
from garrison_agent.events import Post, WorkerSaid
from garrison_agent.runtimes.spec import WorkerSpec
from garrison_agent.runtimes.status import Exited, Failed, Ready, WorkerEvent
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import PackageRef

SlotWord = WorkerReady | WorkerFailed | WorkerExited
STOP_GRACE_S = 5.0


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

    def rss_mb(self) -> float | None:
        """Return its resident memory, None when it is gone."""
        ...


@dataclass(frozen=True)
class Plan:
    """What to run, and how much memory (MiB) the manifest says it takes."""

    spec: WorkerSpec
    memory_mb: int


Build = Callable[[WorkerSpec, Callable[[WorkerEvent], None]], WorkerProcess]
Prepare = Callable[[PackageRef, str, Path], Plan]
"""Returns the plan for a package's variant and a socket; raises GarrisonError where the disk lacks it."""


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
    ready_at: float | None = None
    """Unix seconds."""
    stopping: bool = False


class Workers:
    """Starts and stops workers; turns their events into a slot's. Owner thread only."""

    def __init__(self, sockets: Path, build: Build, prepare: Prepare, post: Post, wall_s: Callable[[], float]) -> None:
        """``sockets`` is the folder of the workers' sockets, which must exist and whose path must be short."""
        self._sockets = sockets
        self._build = build
        self._prepare = prepare
        self._post = post
        self._wall_s = wall_s
        self._running: dict[int, _Running] = {}
        self._generation = 0

    def start(self, alias: str, package: PackageRef, variant: str) -> None:
        """Start a worker, unless one is there. It waits for workers of the alias that are on their way out."""
        if self._find(alias, package) is not None:
            return
        self._generation += 1
        socket = self._sockets / f"{self._generation}.sock"
        running = _Running(alias, package, self._generation, socket, variant=variant)
        self._running[self._generation] = running
        if not self._leaving(alias):
            self._launch(running)

    def stop(self, alias: str, package: PackageRef) -> None:
        """Let the package's worker end; its slot hears no more of it."""
        running = self._find(alias, package)
        if running is None:
            return
        running.stopping = True
        if running.process is None:
            del self._running[running.generation]
        else:
            running.process.stop(STOP_GRACE_S)

    def said(self, said: WorkerSaid) -> tuple[str, SlotWord] | None:
        """Take in what a worker said; return its alias and the slot's event, if it is one for the slot."""
        running = self._running.get(said.generation)
        if running is None:
            return None
        word: SlotWord | None = None
        match said.event:
            case Ready(load_ms=load_ms, rss_mb=rss_mb):
                running.ready_at = self._wall_s()
                word = WorkerReady(running.package, round(load_ms), round(rss_mb))
            case Failed(code=code, message=message):
                word = WorkerFailed(running.package, code, message)
            case Exited(returncode=returncode):
                del self._running[said.generation]
                self._launch_waiting(running.alias)
                word = WorkerExited(running.package, -1 if returncode is None else returncode)
        return None if word is None or running.stopping else (running.alias, word)

    def owner_of(self, generation: int) -> tuple[str, PackageRef] | None:
        """Return which alias and package a worker serves, as long as it runs."""
        running = self._running.get(generation)
        return None if running is None else (running.alias, running.package)

    def socket(self, alias: str, package: PackageRef) -> Path | None:
        """Return the socket of a worker that is ready, else None."""
        running = self._find(alias, package)
        return None if running is None or running.ready_at is None else running.socket

    def ready_since(self, alias: str, package: PackageRef) -> float | None:
        """Return since when (Unix seconds) the worker is ready, else None."""
        running = self._find(alias, package)
        return None if running is None else running.ready_at

    def rss_mb(self, alias: str, package: PackageRef) -> float | None:
        """Return the worker's resident memory in MiB, None where it does not run."""
        running = self._find(alias, package)
        return None if running is None or running.process is None else running.process.rss_mb()

    def gone(self, alias: str, package: PackageRef) -> bool:
        """Tell whether no process of this package is left, not even one that is stopping."""
        return not any(one.alias == alias and one.package == package for one in self._running.values())

    def residents(self) -> list[Resident]:
        """Return what is in memory or on its way there; what is leaving does not count."""
        return [Resident(one.alias, one.memory_mb) for one in self._running.values() if not one.stopping]

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

    def _leaving(self, alias: str) -> bool:
        return any(one.alias == alias and one.stopping for one in self._running.values())

    def _launch_waiting(self, alias: str) -> None:
        if self._leaving(alias):
            return
        for one in list(self._running.values()):
            if one.alias == alias and one.process is None:
                self._launch(one)

    def _launch(self, running: _Running) -> None:
        generation = running.generation

        def on_event(event: WorkerEvent) -> None:
            self._post(WorkerSaid(generation, event))

        try:
            plan = self._prepare(running.package, running.variant, running.socket)
        except GarrisonError as error:
            on_event(Failed(error.code, error.message))
            on_event(Exited(None))
            return
        running.memory_mb = plan.memory_mb
        running.process = self._build(plan.spec, on_event)
        running.process.start()
