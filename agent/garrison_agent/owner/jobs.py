"""Blocking work in threads: download, verify, evaluate, repair. Each job answers with one event of its slot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from garrison_agent.core import slot
from garrison_agent.events import Bug, Post, Progress, SlotEvent
from garrison_agent.registry.download import Cancelled
from garrison_agent.registry.trust import Refresh
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import Evaluation, Manifest, PackageRef, Variant
from garrison_protocol.messages.desired import GateLimits
from garrison_protocol.messages.report import EvaluationSummary
from garrison_protocol.states import WaitReason

REPORT_EVERY_S = 0.25
"""Chunks come by the hundred; nobody looks at progress that often."""
Report = Callable[[int, int], None]
IsCancelled = Callable[[], bool]

_LATER = frozenset({"registry.target_unknown", "registry.stale", "registry.expired", "registry.empty"})
"""Codes that newer metadata will settle."""


class Work(Protocol):
    """What jobs do, all blocking, each in a thread of its own. Raises GarrisonError; Cancelled where asked to end."""

    def refresh(self, want: list[str], high_water: dict[str, int], floor_s: float) -> Refresh:
        """Return the registry's newest state, verified."""
        ...

    def offline(self, want: list[str], high_water: dict[str, int], trusted_at: int, floor_s: float) -> Refresh:
        """Return the kept state of the registry, verified again without a network."""
        ...

    def download(self, manifest: Manifest, variant: Variant, report: Report, cancelled: IsCancelled) -> None:
        """Put every file of the variant on the disk."""
        ...

    def verify(self, variant: Variant, cancelled: IsCancelled) -> None:
        """Read every file back; RefusedError ``download.digest_mismatch`` where one differs."""
        ...

    def evaluate(
        self,
        socket: Path,
        model_id: str,
        evaluation: Evaluation,
        limits: GateLimits,
        *,
        rss_mb: float | None,
        cancelled: IsCancelled,
    ) -> tuple[EvaluationSummary | None, str | None, str | None]:
        """Run the gate; return its summary and, unless passed, code and message."""
        ...

    def health(self, socket: Path, timeout_s: float) -> Mapping[str, object] | None:
        """Return what the worker behind ``socket`` says of itself, None if it does not answer in time."""
        ...

    def repair(self, package: PackageRef, variant: str, report: Report, cancelled: IsCancelled) -> int:
        """Make the package's manifest and files whole again; return how many chunks were wrong."""
        ...


Spawn = Callable[[Callable[[], None]], None]
"""Runs a function in a thread of its own, which never keeps the process alive."""


class Kind(StrEnum):
    """What a job is for; each alias has at most one current job of a kind."""

    DEPLOY = "deploy"
    REPAIR = "repair"


class Jobs:
    """Runs functions in threads. A cancelled job ends unheard."""

    def __init__(self, spawn: Spawn, post: Post) -> None:
        self._spawn = spawn
        self._post = post
        self._current: dict[tuple[str, Kind], threading.Event] = {}

    def run(
        self,
        alias: str,
        kind: Kind,
        work: Callable[[Report, IsCancelled], slot.Event],
        failed: Callable[[GarrisonError], slot.Event],
    ) -> None:
        """Do ``work`` and post its event, or ``failed(error)``, as an event of ``alias``. Cancels the job before."""
        self.cancel(alias, kind)
        cancelled = self._current[alias, kind] = threading.Event()

        reported_at = float("-inf")

        def report(done: int, total: int) -> None:
            nonlocal reported_at
            if not cancelled.is_set() and (done >= total or time.monotonic() - reported_at >= REPORT_EVERY_S):
                reported_at = time.monotonic()
                self._post(Progress(alias, done, total))

        def job() -> None:
            try:
                event = work(report, cancelled.is_set)
            except Cancelled:
                return
            except GarrisonError as error:
                event = failed(error)
            if not cancelled.is_set():
                self._post(SlotEvent(alias, event))

        self.apart(job)

    def apart(self, work: Callable[[], None]) -> None:
        """Do ``work`` in a thread; it posts what it has to say itself."""

        def job() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - a bug, which the owner raises again in its own thread
                self._post(Bug(error))

        self._spawn(job)

    def cancel(self, alias: str, kind: Kind) -> None:
        """Let the alias's job of this kind end without an event."""
        before = self._current.pop((alias, kind), None)
        if before is not None:
            before.set()

    def cancel_all(self) -> None:
        """Let every job end without an event."""
        for alias, kind in list(self._current):
            self.cancel(alias, kind)


def failure(attempt: int, error: GarrisonError) -> slot.Event:
    """Return what a failed job means for its deployment: wait and try again, or the end of it."""
    if error.code in _LATER:
        return slot.MustWait(attempt, WaitReason.METADATA_STALE, error.code, error.message)
    if error.code.startswith("disk."):
        return slot.MustWait(attempt, WaitReason.DISK, error.code, error.message)
    if error.retryable:
        return slot.MustWait(attempt, WaitReason.NETWORK, error.code, error.message)
    return slot.JobFailed(attempt, error.code, error.message)
