"""Canonical JSON and digests, so that equal values have equal bytes everywhere."""

from __future__ import annotations

import hashlib
import json

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: object) -> bytes:
    """Return RFC 8785 bytes for values made of objects, arrays, strings, booleans, null, and integers.

    Floats are refused, since their text differs between writers; callers scale to integers or use strings.

    Raises:
        ValueError: ``value`` holds a float or an integer beyond 2**53.
    """
    _check(value)
    return _ENCODER.encode(value).encode()


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def _check(value: object) -> None:
    match value:
        case float():
            raise ValueError("canonical JSON holds no floats")
        case bool() | None | str():
            return
        case int():
            if abs(value) >= 2**53:
                raise ValueError("canonical JSON holds no integer beyond 2**53")
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError("canonical JSON keys are strings")
                if type(item) is not str:
                    _check(item)
        case list() | tuple():
            for item in value:
                _check(item)
        case _:
            raise ValueError(f"canonical JSON holds no {type(value).__name__}")
