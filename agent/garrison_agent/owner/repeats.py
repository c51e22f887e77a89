"""Rows of earlier epochs that go again, a few at a time: there may be weeks of them, and the owner has other work."""

from __future__ import annotations

import logging

from garrison_agent.events import Tick
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.timers import Timers
from garrison_protocol.errors import InsufficientError

EVERY_S = 0.1
FULL_S = 60.0
"""What fills a disk rarely goes sooner."""

_log = logging.getLogger(__name__)


class Repeats:
    """Lets the journal repeat rows until none is left. Owner thread only."""

    def __init__(self, journal: Journal, timers: Timers) -> None:
        self._journal = journal
        self._timers = timers
        self._set = False

    def begin(self) -> None:
        """Begin, or go on with what a process before this one has left."""
        if not self._set and self._journal.repeating:
            self._after(EVERY_S)

    def due(self) -> None:
        """The timer ran out: repeat some."""
        self._set = False
        try:
            if self._journal.repeat():
                self._after(EVERY_S)
        except InsufficientError as error:
            _log.error("%s. %s", error, error.hint)
            self._after(FULL_S)

    def _after(self, delay_s: float) -> None:
        self._set = True
        self._timers.after(delay_s, Tick.REPEAT)
