"""How long, as people type it: ``10m``, ``1h30m``, ``90``, ``0``, ``-1``."""

from __future__ import annotations

import re

from garrison_protocol.errors import InvalidError

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")


def parse_keep_alive(text: str | None) -> float | None:
    """Return seconds; a plain number is seconds, below 0 means for ever (-1), None stays None. Ollama's notation.

    Raises:
        InvalidError: ``cli.duration_invalid``.
    """
    if text is None:
        return None
    word = text.strip().lower()
    if word.startswith("-"):
        parse_keep_alive(word[1:] if len(word) > 1 else "none")
        return -1.0
    if re.fullmatch(r"\d+(\.\d+)?", word):
        return float(word)
    if _WHOLE.fullmatch(word):
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(word))
    raise InvalidError(
        "cli.duration_invalid",
        f"{text!r} is no duration",
        hint="write 5m, 1h30m, 90s, or a number of seconds; 0 is at once, -1 is never",
    )
