"""Notices about certificates that end soon."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import queries
from garrison_controller.devices.ca import certificate_end
from garrison_controller.devices.pki import CLIENT, DEVICE_CA, SERVER, SERVER_CA

_LOG = logging.getLogger(__name__)
OWN_NOTICE = timedelta(days=60)
BOARD_NOTICE = timedelta(days=7)


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
            found.append(f"pki/{name}.pem ends {end:%Y-%m-%d}: a new authority must be signed into fleet.json")
    with database.reading() as session:
        ending = queries.certificates_ending(session, now + BOARD_NOTICE)
        found += [f"the certificate of board {board.id} ends {board.cert_not_after:%Y-%m-%d %H:%M}" for board in ending]
    for notice in found:
        _LOG.warning("%s", notice)
    return found
