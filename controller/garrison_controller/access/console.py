"""What only the controller's own host may do, without a token: create the first security-admin."""

from __future__ import annotations

from datetime import datetime

from garrison_controller.access import service
from garrison_controller.access.service import IssuedToken
from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.db.migrations import upgrade
from garrison_controller.devices.pki import check_initialised


def bootstrap(config: ControllerConfig, name: str, now: datetime) -> IssuedToken:
    """Create the first security-admin in the controller's database and return its token.

    Raises:
        ConflictError: ``access.bootstrapped``: there is one already.
        NotFoundError: ``controller.not_initialised``.
    """
    check_initialised(config)
    upgrade(config.database_url)
    database = Database(config.database_url)
    try:
        with database.session() as session:
            return service.bootstrap(session, name, now)
    finally:
        database.close()
