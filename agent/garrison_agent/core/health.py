"""What requests add up to, in the integers that telemetry and audit rows hold. Pure.

Times are milliseconds, speeds tokens per second times 1000: canonical JSON has no fractions.
"""

from __future__ import annotations

from collections.abc import Sequence

from garrison_agent.runtimes.status import RequestRecord

CLIENT_GONE = "inference.client_disconnected"


def is_error(record: RequestRecord) -> bool:
    """Tell whether no answer was given; a caller who went away had no use for one."""
    return not record.ok and record.error_code != CLIENT_GONE


def summarize(records: Sequence[RequestRecord]) -> dict[str, int]:
    """Return the telemetry facts of all requests in a window. Times and speeds are left out where none was measured."""
    facts = {
        "requests": len(records),
        "errors": sum(is_error(record) for record in records),
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "completion_tokens": sum(record.completion_tokens for record in records),
    }
    ttfts = [record.ttft_ms for record in records if record.ttft_ms is not None]
    if ttfts:
        facts["ttft_ms_p50"] = round(_median(ttfts))
        facts["ttft_ms_max"] = round(max(ttfts))
    speeds = [record.tokens_per_s for record in records if record.tokens_per_s is not None]
    if speeds:
        facts["tps_milli"] = round(_median(speeds) * 1000)
    return facts


def row(alias: str, model: str, record: RequestRecord) -> dict[str, str | int | bool | None]:
    """Return one request as an audit segment holds it: no word of prompt or answer."""
    facts: dict[str, str | int | bool | None] = {
        "alias": alias,
        "model": model,
        "kind": record.kind,
        "ok": record.ok,
        "status": record.status,
        "error_code": record.error_code,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "ttft_ms": None if record.ttft_ms is None else round(record.ttft_ms),
        "duration_ms": round(record.duration_ms),
        "tps_milli": None if record.tokens_per_s is None else round(record.tokens_per_s * 1000),
        "app": record.app or None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _median(values: list[float]) -> float:
    """Return the middle value. The statistics module would cost every idle board a megabyte."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
