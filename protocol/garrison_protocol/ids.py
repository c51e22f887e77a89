"""Identifiers with the patterns that every part enforces."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import StringConstraints

DEVICE_ID_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,62})$"
NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?$"
VERSION_PATTERN = r"^(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){0,3}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"

DeviceId = Annotated[str, StringConstraints(pattern=DEVICE_ID_PATTERN)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A model name, alias, or rollout name: lower case, digits, ``.``, ``_``, ``-``."""
Version = Annotated[str, StringConstraints(pattern=VERSION_PATTERN)]
"""One to four dotted integers, compared as integers; absent parts are zero."""
Sha256 = Annotated[str, StringConstraints(pattern=SHA256_PATTERN)]
HexKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A raw Ed25519 public key, 32 bytes in hex."""

RESERVED_DEVICE_PREFIX = "controller"
"""Device ids never start so: these common names belong to controllers at the broker."""


def is_device_id(text: str) -> bool:
    """Tell whether ``text`` may name a board (and nothing else at the broker)."""
    return re.fullmatch(DEVICE_ID_PATTERN, text) is not None and not text.startswith(RESERVED_DEVICE_PREFIX)


def version_key(version: str) -> tuple[int, int, int, int]:
    """Return what two versions are compared by.

    Raises:
        ValueError: ``version`` does not match ``VERSION_PATTERN``.
    """
    if re.fullmatch(VERSION_PATTERN, version) is None:
        raise ValueError(f"not a version: {version!r}")
    parts = [int(part) for part in version.split(".")]
    major, minor, patch, build = parts + [0] * (4 - len(parts))
    return major, minor, patch, build
