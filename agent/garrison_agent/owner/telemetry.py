"""Samples of the board's health, and records of requests, into the outbox."""

from __future__ import annotations

from collections.abc import Callable

from garrison_agent.adapters.sensors import Sample
from garrison_agent.core.health import is_error, row, summarize
from garrison_agent.core.meters import Meters
from garrison_agent.events import Tick
from garrison_agent.outbox.journal import SEGMENT_KIND, Journal
from garrison_agent.owner.timers import Timers
from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol.states import Stream

METERS_KIND = "gen_ai"
"""Rows of the telemetry stream that hold histograms."""
SEGMENT_S = 1.0
"""Requests of one second share one audit entry, and one fsync."""
SEGMENT_ROWS = 300
"""Requests in one entry, far below what an envelope holds."""
SEGMENT_BODIES = 50_000
"""Segments whose request rows are kept; of older ones only the committed headers stay."""
MAX_WINDOW_RECORDS = 100_000
SPEED_TOKENS = 8
"""Shorter answers say little of a model's speed."""
MAX_METER_ROWS = 32
"""Models and operations that one sample tells apart."""


class Telemetry:
    """Counts requests between samples, and writes both down. Owner thread only."""

    def __init__(
        self,
        *,
        journal: Journal,
        timers: Timers,
        read_sample: Callable[[], Sample],
        monotonic_s: Callable[[], float],
        max_rows: int,
    ) -> None:
        self._journal = journal
        self._timers = timers
        self._read_sample = read_sample
        self._monotonic_s = monotonic_s
        self._max_rows = max_rows
        self._since_s = monotonic_s()
        self._window: list[RequestRecord] = []
        self._meters = Meters()
        """Since the agent started, but for the window."""
        self._window_meters = Meters()
        self._segment: list[tuple[str, str, RequestRecord]] = []
        self.speeds: dict[str, float] = {}
        """Tokens a second of answers lately, by alias; newer ones count more."""
        self.latest: dict[str, int] = {}
        """The newest sample's facts, for ``status``."""

    def request_done(self, alias: str, model: str, record: RequestRecord) -> None:
        """Count a request; it is in the audit log within ``SEGMENT_S``."""
        if len(self._window) < MAX_WINDOW_RECORDS:
            self._window.append(record)
        self._window_meters.add(alias, record)
        if record.tokens_per_s is not None and record.completion_tokens >= SPEED_TOKENS:
            self.speeds[alias] = (self.speeds.get(alias, record.tokens_per_s) + record.tokens_per_s) / 2
        if not self._segment:
            self._timers.after(SEGMENT_S, Tick.SEGMENT)
        self._segment.append((alias, model, record))

    def write_segment(self) -> None:
        """Put the requests since the last segment into the audit log."""
        records, self._segment = self._segment, []
        for at in range(0, len(records), SEGMENT_ROWS):
            part = records[at : at + SEGMENT_ROWS]
            errors = sum(is_error(record) for _, _, record in part)
            body = [row(alias, model, record) for alias, model, record in part]
            self._journal.append(Stream.AUDIT, SEGMENT_KIND, {"count": len(part), "errors": errors}, body, spare=True)

    def sample(self, *, online: bool, loaded: list[str]) -> None:
        """Measure, and put a row into the telemetry stream."""
        now = self._monotonic_s()
        health = self.measure()
        health |= summarize(self._window)
        health["window_s"] = round(now - self._since_s)
        meters, self._window_meters = self._window_meters, Meters()
        self._meters.merge(meters)
        self._window, self._since_s = [], now
        self.latest = health
        facts: dict[str, str | int | bool | None] = {**health, "online": online, "loaded": ",".join(sorted(loaded))}
        self._journal.append(Stream.TELEMETRY, "sample", facts, spare=True)
        for measured in meters.rows()[:MAX_METER_ROWS]:
            measured["window_s"] = health["window_s"]
            self._journal.append(Stream.TELEMETRY, METERS_KIND, measured, spare=True)

    def all_meters(self) -> Meters:
        """Return what was counted since the agent started."""
        both = Meters()
        both.merge(self._meters)
        both.merge(self._window_meters)
        return both

    def measure(self) -> dict[str, int]:
        """Return what the board's sensors say now."""
        sample = self._read_sample()
        facts = {
            "cpu_permille": round(sample.cpu_percent * 10),
            "mem_used_mb": sample.memory_used_mb,
            "mem_total_mb": sample.memory_total_mb,
            "disk_free_mb": sample.disk_free_mb,
            "rss_mb": sample.rss_mb,
        }
        if sample.temperature_c is not None:
            facts["temp_mc"] = round(sample.temperature_c * 1000)
        return facts

    def thin(self) -> None:
        """Keep the outbox within its caps; the audit chain says what went."""
        self._journal.thin(telemetry_rows=self._max_rows, segment_bodies=SEGMENT_BODIES)
