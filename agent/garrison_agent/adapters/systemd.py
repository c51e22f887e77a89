"""What a ``Type=notify`` service tells systemd (sd_notify(3)); does nothing when it was not started by systemd."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send ``state`` (``READY=1``, ``WATCHDOG=1``, ``STOPPING=1``, ``STATUS=...``); True if somebody takes it.

    Raises:
        OSError: systemd asked to be told but does not listen.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), address)
    return True


def watchdog_interval_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return how often to send ``WATCHDOG=1`` (half of what systemd allows), or None if it does not watch us."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        allowed_us = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return allowed_us / 2_000_000 if allowed_us > 0 else None
