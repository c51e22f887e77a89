"""Notices about certificates that end soon, and that nobody renews by itself.

Boards renew theirs when two thirds of its life are over, or when they come back after its end, within the grace time.
What is left to say: a board that is there and does not renew, and boards that stay away too long.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import queries
from garrison_controller.devices.ca import certificate_end
from garrison_controller.devices.pki import CLIENT, DEVICE_CA, SERVER, SERVER_CA
from garrison_controller.devices.tables import Device

_LOG = logging.getLogger(__name__)
OWN_NOTICE = timedelta(days=60)
OVERDUE_SHARE = 4
"""A board that has less than this part of a certificate's life left should have renewed it."""
PRESENT = timedelta(days=1)
"""A board that was heard within it could have renewed."""
GRACE_NOTICE = timedelta(days=30)


def notices(config: ControllerConfig, database: Database, now: datetime) -> list[str]:
    """Return one sentence for each certificate of the controller or of a board that ends soon, and log it."""
    found = []
    for name in (SERVER, CLIENT):
        end = certificate_end(config.pki_dir / f"{name}.pem")
        if end - now < OWN_NOTICE:
            found.append(f"pki/{name}.pem ends {end:%Y-%m-%d}: run `garrison serve renew`, then restart")
    for name in (DEVICE_CA, SERVER_CA):
        end = certificate_end(config.pki_dir / f"{name}.pem")
        if end - now < OWN_NOTICE:
            found.append(f"pki/{name}.pem ends {end:%Y-%m-%d}: begin with `garrison serve rotate-key {name}`")
        if (config.pki_dir / f"{name}.old.key").exists():
            found.append(f"the old {name} is still trusted: `garrison serve retire-ca {name}` once nobody needs it")
    with database.reading() as session:
        overdue = timedelta(days=config.devices.certificate_days) / OVERDUE_SHARE
        found += board_notices(
            queries.certificates_ending(session, now + overdue), timedelta(days=config.devices.grace_days), now
        )
    for notice in found:
        _LOG.warning("%s", notice)
    return found


def board_notices(boards: Sequence[Device], grace: timedelta, now: datetime) -> list[str]:
    """Return what to say about admitted boards whose certificate ended, or should have been renewed by now."""
    found, away = [], 0
    for board in boards:
        end, last = board.cert_not_after, board.cert_not_after + grace
        if last <= now:
            found.append(
                f"board {board.id} has been away too long to renew its certificate, which ended {end:%Y-%m-%d}: "
                f"`garrison device rotate {board.id}` when it comes back, or `garrison device revoke {board.id}`"
            )
        elif board.last_seen_at is not None and now - board.last_seen_at < PRESENT:
            found.append(
                f"board {board.id} is there and has not renewed its certificate, which ends {end:%Y-%m-%d %H:%M}: "
                "see `garrison-agent doctor` on it"
            )
        elif last - now < GRACE_NOTICE:
            found.append(
                f"board {board.id} can renew its certificate until {last:%Y-%m-%d}; after that it must be replaced"
            )
        elif end <= now:
            away += 1
    if away:
        found.append(f"{away} boards are away and their certificates have ended; they renew them when they come back")
    return found
