"""Looks after workers that have requests: one that does not get on with them is ended, and starts again.

While no request is in flight nothing here wakes anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from garrison_agent.api.traffic import Traffic
from garrison_agent.core.progress import CHECKS, Watch, stalled, watch
from garrison_agent.events import HealthSeen, Post, Tick
from garrison_agent.owner.jobs import Jobs
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.workers import Workers

AskHealth = Callable[[Path, float], Mapping[str, object] | None]
"""Returns what a worker says of itself, None if it does not within so many seconds. Blocking."""


class Stalls:
    """Owner thread only."""

    def __init__(
        self,
        *,
        workers: Workers,
        traffic: Traffic,
        timers: Timers,
        jobs: Jobs,
        post: Post,
        ask: AskHealth,
        monotonic_s: Callable[[], float],
        timeout_s: float,
    ) -> None:
        self._workers = workers
        self._traffic = traffic
        self._timers = timers
        self._jobs = jobs
        self._post = post
        self._ask = ask
        self._monotonic_s = monotonic_s
        self._timeout_s = timeout_s
        self._watches: dict[int, Watch] = {}

    def look(self) -> None:
        """Look at every worker with requests in flight, and again after a while if there is one."""
        if self._traffic.rest():
            self._watches.clear()
            return
        now_s = self._monotonic_s()
        busy = {one.generation: one for one in self._workers.loaded() if self._traffic.look(one.socket).active}
        self._watches = {generation: self._watches.get(generation) or Watch(now_s) for generation in busy}
        for generation, one in busy.items():
            self._question(generation, one.socket)
        self._timers.after(self._every_s, Tick.STALL)

    def seen(self, event: HealthSeen) -> None:
        """Take in what a worker answered, and end it if it has stood still for too long."""
        before, now_s = self._watches.get(event.generation), self._monotonic_s()
        if before is None:
            return
        self._watches[event.generation] = seen = watch(before, event.health, now_s)
        if stalled(seen, self._timeout_s, now_s):
            waited_s = max(self._timeout_s, seen.step_timeout_s)
            message = f"its worker had requests and did not get on with them for {waited_s:.0f} s"
            self._workers.stalled(event.generation, message)

    @property
    def _every_s(self) -> float:
        return self._timeout_s / CHECKS

    def _question(self, generation: int, socket: Path) -> None:
        ask, post, timeout_s = self._ask, self._post, self._every_s

        def job() -> None:
            post(HealthSeen(generation, ask(socket, timeout_s)))

        self._jobs.apart(job)
