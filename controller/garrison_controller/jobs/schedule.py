"""What the controller does by the clock. Jobs run in the scheduler's threads; each is one transaction or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger


@dataclass(frozen=True, slots=True)
class Job:
    """Work to repeat every ``every_s`` seconds, first at once. ``run`` gets the time (aware UTC)."""

    name: str
    every_s: float
    run: Callable[[datetime], object]


def build_scheduler(jobs: tuple[Job, ...]) -> BackgroundScheduler:
    """Return a scheduler, not yet started, that runs ``jobs``.

    A job never runs beside itself; runs that were missed are made up once. APScheduler logs a job that fails
    and runs it again at its next time: what it left undone is still due then.
    """
    scheduler = BackgroundScheduler(
        executors={"default": ThreadPoolExecutor(max(2, len(jobs)))},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        timezone=UTC,
    )
    for job in jobs:
        trigger = IntervalTrigger(seconds=job.every_s, timezone=UTC)
        scheduler.add_job(_run, trigger, args=(job,), id=job.name, name=job.name, next_run_time=datetime.now(UTC))
    return scheduler


def _run(job: Job) -> None:
    job.run(datetime.now(UTC))
