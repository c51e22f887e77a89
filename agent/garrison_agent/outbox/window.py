"""Which rows of one stream to send next (docs/protocol.md, "Streams and receipts"). Pure: no clock, no I/O.

A broker's acknowledgement proves nothing, so only receipts move the window. Rows go again after a reconnect, after a
time without progress, and when a receipt asks for them; the controller ignores duplicates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

MAX_IN_FLIGHT = 4
"""Batches under way per stream."""
RESEND_AFTER_S = 15.0
RESEND_AFTER_MAX_S = 240.0


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch under way, by its last row, and when it left (monotonic seconds)."""

    last: int
    sent_at: float


@dataclass(frozen=True, slots=True)
class SendWindow:
    """The sending side of one stream. Every method returns the next window; ``now`` is monotonic seconds.

    ``acked`` is what the controller said it holds, ``cursor`` the newest row handed to the link.
    """

    epoch: str
    acked: int
    cursor: int
    online: bool = False
    flights: tuple[Flight, ...] = ()
    timeouts: int = 0
    progress_at: float = 0.0
    rewound: Flight | None = field(default=None)

    @classmethod
    def start(cls, epoch: str, acked: int) -> SendWindow:
        """Return the window of a process that just began; everything behind ``acked`` is to be sent."""
        return cls(epoch=epoch, acked=acked, cursor=acked)

    def next_after(self, head: int) -> int | None:
        """Return the row behind which the next batch begins, or None if nothing is to be sent now."""
        if not self.online or self.cursor >= head or len(self.flights) >= self._limit:
            return None
        return self.cursor

    def sent(self, last: int, now: float) -> SendWindow:
        """Note that the link took a batch that ends with row ``last``."""
        return replace(self, cursor=max(self.cursor, last), flights=(*self.flights, Flight(last, now)))

    def connected(self) -> SendWindow:
        """Begin again behind ``acked``: whatever was under way may be lost."""
        return replace(self, online=True, cursor=self.acked, flights=(), timeouts=0, rewound=None)

    def disconnected(self) -> SendWindow:
        """Send nothing until ``connected``."""
        return replace(self, online=False, cursor=self.acked, flights=())

    def received(self, epoch: str, up_to: int, resend: bool, now: float) -> SendWindow:
        """Take in a receipt that the journal did not find false; one of another epoch changes nothing.

        A receipt that asks for rows rewinds to them, even behind ``acked`` (a controller restored from a backup),
        but only once per ``resend_after_s``: each batch behind a lost one draws the same request.
        """
        if epoch != self.epoch:
            return self
        if resend:
            return self._rewound(up_to, now)
        if up_to <= self.acked:
            return self
        return replace(
            self,
            acked=up_to,
            cursor=max(self.cursor, up_to),
            flights=tuple(flight for flight in self.flights if flight.last > up_to),
            timeouts=0,
            progress_at=now,
            rewound=None,
        )

    def tick(self, now: float) -> SendWindow:
        """Send again what nobody confirmed in time: slower each time, and one batch as a probe until progress."""
        deadline = self.deadline
        if deadline is None or now < deadline:
            return self
        return replace(self, cursor=self.acked, flights=(), timeouts=self.timeouts + 1, rewound=None)

    @property
    def deadline(self) -> float | None:
        """When ``tick`` will act next, or None if nothing is under way."""
        if not self.flights:
            return None
        return max(self.flights[0].sent_at, self.progress_at) + self.resend_after_s

    @property
    def resend_after_s(self) -> float:
        """How long a batch may go unconfirmed, doubled by every time-out without progress."""
        return min(RESEND_AFTER_S * 2.0 ** min(self.timeouts, 16), RESEND_AFTER_MAX_S)

    @property
    def _limit(self) -> int:
        return 1 if self.timeouts else MAX_IN_FLIGHT

    def _rewound(self, up_to: int, now: float) -> SendWindow:
        before = self.rewound
        if before is not None and before.last == up_to and now - before.sent_at < self.resend_after_s:
            return self
        return replace(
            self,
            acked=up_to,
            cursor=up_to,
            flights=(),
            timeouts=0 if up_to > self.acked else self.timeouts,
            progress_at=now,
            rewound=Flight(up_to, now),
        )
