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


def utc_text(milliseconds: int) -> str:
    """Return Unix milliseconds as UTC text for a table."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
