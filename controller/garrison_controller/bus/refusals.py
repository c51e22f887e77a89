"""Counts what is refused at the broker, by sender and code. Runs inside the caller's transaction."""

from __future__ import annotations

import logging
from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.audit.tables import Refusal

MAX_DETAIL_LENGTH = 500
_LOG = logging.getLogger(__name__)


def count(session: Session, sender: str, code: str, message: str, now: datetime, *, times: int = 1) -> None:
    """Add ``times`` refusals of ``sender``, a board's id, or empty for nobody enrolled."""
    row = session.get(Refusal, (sender, code), with_for_update=True)
    if row is None:
        row = Refusal(sender=sender, code=code, count=0)
        session.add(row)
    row.count += times
    row.last_at = now
    row.last_message = message.replace("\x00", "")[:MAX_DETAIL_LENGTH]
    _LOG.warning("refused %d messages of %s: %s: %s", times, sender or "nobody enrolled", code, message)
