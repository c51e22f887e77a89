"""Boards' HTTP sessions: a nonce, answered once with the identity key, gives a bearer for an hour.

Both are sealed with a key of this process and hold their own expiry; only nonces that were answered are remembered,
until they would have expired, so strangers cannot fill the memory. Source: docs/protocol.md, "Device requests".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import threading
from collections.abc import Callable

from garrison_protocol.errors import UnauthenticatedError
from garrison_protocol.ids import is_device_id

NONCE_LIFETIME_S = 300
SESSION_LIFETIME_S = 3600
MAX_SEALED_LENGTH = 256
IDENTITY_DIGITS = 32
"""So many hex digits (128 bits) of a key name it in a bearer."""


class Sessions:
    """Issues and checks nonces and bearers. Thread-safe. ``now_s`` is Unix time."""

    def __init__(self, now_s: Callable[[], float], key: bytes | None = None) -> None:
        self._now_s = now_s
        self._key = key or os.urandom(32)
        self._answered: dict[str, int] = {}
        self._lock = threading.Lock()

    def nonce(self) -> str:
        """Return a new nonce."""
        return self._seal("nonce", os.urandom(16).hex(), int(self._now_s()) + NONCE_LIFETIME_S)

    def spend_nonce(self, nonce: str) -> None:
        """Use ``nonce``, whose answer the caller has verified; nobody can use it again.

        Raises:
            UnauthenticatedError: ``session.nonce_invalid``.
        """
        expires = self._expiry("nonce", nonce)
        now = self._now_s()
        with self._lock:
            if expires is None or nonce in self._answered:
                raise UnauthenticatedError(
                    "session.nonce_invalid", "the nonce is unknown, old, or used", hint="ask for a new one"
                )
            self._answered = {known: end for known, end in self._answered.items() if end > now}
            self._answered[nonce] = expires

    def open(self, device: str, identity: str) -> str:
        """Return a bearer for ``device``, whose identity key (hex) is ``identity``."""
        holder = f"{device}:{identity[:IDENTITY_DIGITS]}"
        return self._seal("session", holder, int(self._now_s()) + SESSION_LIFETIME_S)

    def holder(self, bearer: str) -> tuple[str, str]:
        """Return the board that ``bearer`` was given to, and what its identity key began with.

        The caller checks that the board is not revoked since and still has that key.

        Raises:
            UnauthenticatedError: ``session.expired`` (or never given, or by an earlier process).
        """
        if self._expiry("session", bearer) is None:
            raise UnauthenticatedError(
                "session.expired", "the session has ended", hint="answer a new nonce at /device/v1/session"
            )
        device, _, identity = bearer.split(".", maxsplit=1)[0].partition(":")
        assert is_device_id(device)
        return device, identity

    def _seal(self, purpose: str, text: str, expires: int) -> str:
        body = f"{text}.{expires}.{os.urandom(8).hex()}"
        return f"{body}.{self._mac(purpose, body)}"

    def _expiry(self, purpose: str, sealed: str) -> int | None:
        """Return the expiry of a sealed text that is ours and not over, else None."""
        body, _, mac = sealed.rpartition(".")
        if len(sealed) > MAX_SEALED_LENGTH or not hmac.compare_digest(mac.encode(), self._mac(purpose, body).encode()):
            return None
        expires = int(body.split(".")[1])
        return expires if self._now_s() < expires else None

    def _mac(self, purpose: str, body: str) -> str:
        digest = hmac.new(self._key, f"{purpose}\n{body}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")
