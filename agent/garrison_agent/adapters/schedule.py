"""Work that belongs to the calendar rather than to a deadline: it only posts ticks (APScheduler)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC

from apscheduler.schedulers.background import BackgroundScheduler

from garrison_agent.events import Post, Tick


class Schedule:
    """Posts each tick every so many seconds. What was missed while the board slept comes once."""

    def __init__(self, post: Post, every: Mapping[Tick, float]) -> None:
        self._scheduler = BackgroundScheduler(timezone=UTC, daemon=True)
        for tick, period_s in every.items():
            self._scheduler.add_job(
                post,
                "interval",
                seconds=period_s,
                args=(tick,),
                id=tick.value,
                coalesce=True,
                misfire_grace_time=None,
                jitter=period_s / 10,
            )

    def start(self) -> None:
        """Begin."""
        self._scheduler.start()

    def stop(self) -> None:
        """End; a job that runs just posts."""
        self._scheduler.shutdown(wait=False)
