"""Numbers for connections to the broker, stored before they are used: a death counts only for the newest one."""

from __future__ import annotations

import threading
from collections.abc import Callable

from garrison_agent.adapters.database import Database
from garrison_protocol.errors import UnavailableError

_KEY = "connection.reserved"
BLOCK = 64


class ConnectionNumbers:
    """Numbers that only grow, across restarts.

    The owner thread stores the end of a block ahead (``reserve``); the link's thread takes from it without waiting.
    Numbers of a block that a crash left over are never used.
    """

    def __init__(self, database: Database, low: Callable[[], None]) -> None:
        """``low`` is called in the link's thread when it is time for ``reserve``."""
        self._database = database
        self._low = low
        self._lock = threading.Lock()
        self._current = self._end = int(database.get(_KEY) or 0)
        self.reserve()

    @property
    def current(self) -> int:
        """The number taken last."""
        return self._current

    def reserve(self) -> None:
        """Store a further block. Owner thread only."""
        end = self._end + BLOCK
        self._database.put(_KEY, str(end))
        with self._lock:
            self._end = end

    def take(self) -> int:
        """Return the next number. Any thread.

        Raises:
            UnavailableError: ``agent.busy``; the owner has not come to store more.
        """
        with self._lock:
            if self._current >= self._end:
                raise UnavailableError("agent.busy", "no connection number is stored yet", retryable=True)
            self._current += 1
            number, low = self._current, self._end - self._current <= BLOCK // 2
        if low:
            self._low()
        return number
