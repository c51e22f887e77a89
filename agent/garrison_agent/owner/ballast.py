"""Tells the audit log when the store's ballast is given up and when it is there again."""

from __future__ import annotations

import logging

from garrison_agent.adapters.database import Database
from garrison_agent.outbox.journal import Journal
from garrison_protocol.states import Stream

_GONE = "disk.ballast_gone"

_log = logging.getLogger(__name__)


class BallastWatch:
    """Owner thread only. ``look`` after every event: the store gives the ballast up in whatever writes first."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal
        self._told = database.get(_GONE) == "1"

    def look(self) -> None:
        """Record what has changed since the last look, also that of a process before this one.

        Raises:
            InsufficientError: ``disk.full``; the next look tries again.
        """
        ballast = self._database.ballast
        gone = not ballast.held and (self._told or ballast.scarce)
        if gone == self._told:
            return
        free_bytes = ballast.free_bytes
        with self._database.transaction():
            self._database.put(_GONE, "1" if gone else "0")
            kind = "disk.ballast_released" if gone else "disk.ballast_restored"
            self._journal.append(Stream.AUDIT, kind, {"free_bytes": free_bytes})
        self._told = gone
        if gone:
            _log.error("the disk is full: only decisions are recorded now. Free space (`garrison-agent cache list`)")
        else:
            _log.info("the disk has room again: telemetry and requests are recorded")

    def restore(self) -> None:
        """Have the ballast again where there is room."""
        self._database.restore_ballast()
        self.look()
