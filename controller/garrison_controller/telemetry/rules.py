"""What telemetry rows say, alone and together. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Sample = dict[str, str | int | bool | None]
"""``epoch``, ``seq``, ``time_ms``, and the facts of the row under their own names (docs/protocol.md, "Telemetry")."""

_PLACE = frozenset({"epoch", "seq", "time_ms"})
_SUMS = ("requests", "errors", "prompt_tokens", "completion_tokens")
_PEAKS = ("cpu_permille", "mem_used_mb", "temp_mc", "rss_mb", "ttft_ms_max")


def sample(epoch: str, seq: int, time_ms: int, header: Mapping[str, object]) -> Sample:
    """Return one row as clients see it. Facts have names of two letters or more; the header's own have one."""
    place: Sample = {"epoch": epoch, "seq": seq, "time_ms": time_ms}
    facts: Sample = {
        _text(key): _text(value) if isinstance(value, str) else value
        for key, value in header.items()
        if len(key) > 1 and key not in _PLACE and (value is None or isinstance(value, (str, int)))
    }
    return place | facts


def _text(text: str) -> str:
    """Return text that an answer can hold: JSON may name half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def summary(samples: Sequence[Sample]) -> dict[str, int | None]:
    """Return what samples say together: how many and over which time, sums, peaks, and the median speed.

    ``offline`` counts the samples that were taken without a connection.
    """
    times = numbers(samples, "time_ms")
    speeds = sorted(numbers(samples, "tps_milli"))
    result: dict[str, int | None] = {
        "rows": len(samples),
        "offline": sum(one.get("online") is False for one in samples),
        "from_ms": min(times, default=None),
        "to_ms": max(times, default=None),
    }
    result |= {key: sum(numbers(samples, key)) for key in _SUMS}
    result |= {f"{key}_peak": max(numbers(samples, key), default=None) for key in _PEAKS}
    result["tps_milli_median"] = speeds[len(speeds) // 2] if speeds else None
    return result


def numbers(samples: Sequence[Sample], key: str) -> list[int]:
    """Return the integers that samples hold under ``key``; other values, which a board should not send, are skipped."""
    return [value for one in samples if type(value := one.get(key)) is int]
