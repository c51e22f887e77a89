"""Durations and times as people type them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from garrison_protocol.errors import InvalidError

_DURATION = re.compile(r"(\d{1,6})(s|m|h|d|w)")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(text: str) -> timedelta:
    """Return the duration that ``text`` (``90s``, ``2h``, ``7d``) says.

    Raises:
        InvalidError: ``usage.duration_malformed``.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise InvalidError("usage.duration_malformed", f"{text!r} is no duration", hint="write 90s, 15m, 2h, 7d or 4w")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit that divides it: ``5 s``, ``90 min``, ``2 h``, ``1 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"


def moment(text: str | None) -> str | None:
    """Return an ISO 8601 time of the API as UTC text for people, to the second."""
    if not text:
        return None
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def utc_text(milliseconds: int) -> str:
    """Return Unix milliseconds as UTC text for a table."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
