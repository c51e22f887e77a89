"""Applications that share the board's local API: their keys, what each may use, and how much. Pure.

A key is ``gsk_`` and 32 random bytes in hex. It is stored as its SHA-256 alone: what is random needs no slow hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hmac import compare_digest

from garrison_agent.core.rate import Bucket
from garrison_protocol.errors import InvalidError

KEY_PREFIX = "gsk_"
KEY_BYTES = 32
MAX_APPLICATIONS = 256
MAX_PER_MINUTE = 1_000_000_000
LOCAL = "local"
"""Whoever calls over TCP without a key, where none is needed."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Application:
    """One application. A limit of 0 is none; no ``models``: all of them. ``models`` holds names as clients use them."""

    name: str
    key_sha256: str
    created_at: int
    """Unix seconds."""
    models: frozenset[str] = frozenset()
    requests_per_min: int = 0
    tokens_per_min: int = 0
    """Prompt and answer together."""
    concurrent: int = 0
    """Requests in progress or waiting."""
    admin: bool = False
    """May also manage the board's models, and applications."""

    def may_use(self, names: tuple[str, ...]) -> bool:
        """Tell whether a model that answers to ``names`` is one of its own."""
        return not self.models or not self.models.isdisjoint(names)


@dataclass(frozen=True, slots=True)
class ApplicationTable:
    """All applications at one moment, and what is left of each one's tokens. Shared between threads: never changed."""

    applications: tuple[Application, ...] = ()
    tokens: Mapping[str, Bucket] = field(default_factory=dict)
    """By name, where tokens are limited and some were used."""

    def find(self, name: str) -> Application | None:
        """Return the application called ``name``."""
        return next((one for one in self.applications if one.name == name), None)

    def of_key(self, key: str) -> Application | None:
        """Return whose ``key`` this is."""
        digest = key_digest(key)
        return next((one for one in self.applications if compare_digest(one.key_sha256, digest)), None)

    def added(self, application: Application) -> ApplicationTable:
        """Return the table with one more application."""
        applications = sorted((*self.applications, application), key=lambda one: one.name)
        return replace(self, applications=tuple(applications))

    def removed(self, name: str) -> ApplicationTable:
        """Return the table without an application."""
        return ApplicationTable(
            tuple(one for one in self.applications if one.name != name),
            {app: bucket for app, bucket in self.tokens.items() if app != name},
        )

    def spent(self, name: str, tokens: int, now_s: float) -> ApplicationTable:
        """Return the table after an application used ``tokens``; this one, where nothing limits them."""
        application = self.find(name)
        if application is None or not application.tokens_per_min or not tokens:
            return self
        bucket = self.tokens.get(name) or Bucket.full(application.tokens_per_min, now_s)
        return replace(self, tokens={**self.tokens, name: bucket.take(tokens, now_s)})


def key_digest(key: str) -> str:
    """Return what is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def is_key(text: str) -> bool:
    """Tell whether ``text`` wants to be one of our keys: others, which clients send by default, mean nothing."""
    return text.startswith(KEY_PREFIX)


def check_name(name: str) -> None:
    """Refuse what cannot name an application.

    Raises:
        InvalidError: ``app.name_malformed``.
    """
    if _NAME.fullmatch(name) is None or name == LOCAL:
        raise InvalidError(
            "app.name_malformed",
            f"{name!r} cannot name an application",
            hint=f"use lower case, digits, '.', '_', '-', at most 63, and not {LOCAL!r}",
        )


def check_limits(**limits: int) -> None:
    """Refuse limits that are no counts.

    Raises:
        InvalidError: ``app.limit_out_of_range``.
    """
    for name, value in limits.items():
        if not 0 <= value <= MAX_PER_MINUTE:
            raise InvalidError(
                "app.limit_out_of_range",
                f"{name} of {value} is no limit",
                hint=f"give a number from 1 to {MAX_PER_MINUTE}, or none",
                limit=name,
            )
