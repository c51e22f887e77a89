"""Which bytes of one transfer were asked for, which came, and what to ask for next. Pure: no clock, no I/O.

A board asks for at most two windows at a time, so that it alone decides how much of the link and of everybody's memory
it takes. A window grows while it is filled fast and shrinks where that takes long, so that on a slow link a desired
state or a keep-alive never waits behind megabytes. Source: docs/protocol.md, "Fetch".
"""

from __future__ import annotations

from dataclasses import dataclass

from garrison_protocol.messages.fetch import MAX_PIECE_BYTES, Chunk

OUTSTANDING = 2
MIN_WINDOW_BYTES = 16 * 1024
FIRST_WINDOW_BYTES = 64 * 1024
MAX_WINDOW_BYTES = 2 * 1024 * 1024
AHEAD_BYTES = OUTSTANDING * MAX_WINDOW_BYTES
"""What came too early is held, but never beyond so far from the next byte that is due."""
FAST_S = 1.0
SLOW_S = 4.0


@dataclass(frozen=True)
class Window:
    """``length`` bytes to ask for from ``offset`` on, to come in pieces of ``piece`` bytes."""

    offset: int
    length: int
    piece: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


@dataclass
class _Asked:
    window: Window
    at_s: float
    received: int = 0


class Windows:
    """The state of one transfer from ``offset`` on. Times are of one monotonic clock; the caller locks."""

    def __init__(self, offset: int = 0, *, first_bytes: int = FIRST_WINDOW_BYTES) -> None:
        self.position = offset
        """The next byte for the reader."""
        self.total: int | None = None
        """How long the whole is, as the other side says."""
        self._size = first_bytes
        self._asked: dict[str, _Asked] = {}
        self._held: dict[int, bytes] = {}

    @property
    def done(self) -> bool:
        """Whether the reader has everything."""
        return self.total is not None and self.position >= self.total

    @property
    def outstanding(self) -> tuple[str, ...]:
        """The requests that are not answered in full, the oldest first."""
        return tuple(self._asked)

    def next_window(self) -> Window | None:
        """Return what to ask for now; None while enough is on its way, or nothing is left."""
        if len(self._asked) >= (1 if self.total is None else OUTSTANDING):
            return None
        begin = self._first_gap()
        end = min(begin + self._size, self.position + AHEAD_BYTES)
        if self.total is not None:
            end = min(end, self.total)
        starts = [*self._held, *(asked.window.offset for asked in self._asked.values())]
        end = min([end, *(start for start in starts if start > begin)])
        if end <= begin:
            return None
        return Window(begin, end - begin, min(max(self._size // 4, MIN_WINDOW_BYTES), MAX_PIECE_BYTES))

    def asked(self, request: str, window: Window, now_s: float) -> None:
        """Note that ``window`` was asked for under ``request``."""
        self._asked[request] = _Asked(window, now_s)

    def take(self, chunk: Chunk, now_s: float) -> bool:
        """Keep a data chunk that was asked for; False for any other, which changes nothing."""
        asked = self._asked.get(chunk.request)
        if asked is None or self.total not in (None, chunk.total):
            return False
        window = asked.window
        end = max(window.offset, min(window.end, chunk.total))
        if end == window.offset:  # nothing is there
            if chunk.data or chunk.offset != window.offset:
                return False
        else:
            at = chunk.offset - window.offset
            if not 0 <= at < end - window.offset or at % window.piece:
                return False
            if len(chunk.data) != min(window.piece, end - chunk.offset):
                return False
            if chunk.offset < self.position or chunk.offset in self._held:
                return False
            self._held[chunk.offset] = chunk.data
        self.total = chunk.total
        asked.received += len(chunk.data)
        if asked.received == end - window.offset:
            self._close(chunk.request, now_s)
        return True

    def pop(self) -> bytes | None:
        """Return the bytes at ``position`` and move on, or None while they have not come."""
        data = self._held.pop(self.position, None)
        if data is not None:
            self.position += len(data)
        return data

    def forget(self) -> None:
        """Give up on everything outstanding: it will be asked for again, in smaller windows."""
        self._asked.clear()
        self._size = max(MIN_WINDOW_BYTES, self._size // 4)
        if not self._held:
            self.total = None  # whoever told it may have lied, or the file was replaced

    def _close(self, request: str, now_s: float) -> None:
        for earlier in list(self._asked):
            asked = self._asked.pop(earlier)
            if earlier == request:
                break  # those before it have lost pieces: one connection keeps the order, so they come no more
        took_s = now_s - asked.at_s
        if took_s < FAST_S:
            self._size = min(MAX_WINDOW_BYTES, self._size * 2)
        elif took_s > SLOW_S:
            self._size = max(MIN_WINDOW_BYTES, self._size // 2)

    def _first_gap(self) -> int:
        ends = {start: start + len(data) for start, data in self._held.items()}
        ends |= {asked.window.offset: asked.window.end for asked in self._asked.values()}
        at = self.position
        for start in sorted(ends):
            if start > at:
                break
            at = max(at, ends[start])
        return at
