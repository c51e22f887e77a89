"""Conversations that had to leave the model's own memory, kept in the worker's within a bound. Pure.

What is kept are copies of keys and values as the backend gives them. Nothing of it is ever written to disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_TOKEN_BYTES = 8
_COMPARED = 256


@dataclass(frozen=True, eq=False)
class Saved:
    """What a sequence held: its tokens, and the backend's copy of their keys and values."""

    tokens: list[int]
    state: bytes | bytearray

    @property
    def size_bytes(self) -> int:
        """What it costs to keep."""
        return len(self.state) + _TOKEN_BYTES * len(self.tokens)


class PrefixStore:
    """At most ``limit_bytes`` of copies; the one that was not used for longest goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._saved: list[Saved] = []
        """In the order of their last use."""
        self.size_bytes = 0

    def keep(self, tokens: Sequence[int], state: bytes | bytearray) -> None:
        """Take in a copy; it replaces those of its own beginnings. One that is larger than the bound is not kept."""
        new = Saved(list(tokens), state)
        for old in list(self._saved):
            if shared(old.tokens, new.tokens, len(old.tokens)) == len(old.tokens):
                self.drop(old)
        self._saved.append(new)
        self.size_bytes += new.size_bytes
        while self.size_bytes > self.limit_bytes:
            self.drop(self._saved[0])

    def find(self, tokens: Sequence[int], limit: int, *, whole: bool = False) -> tuple[Saved | None, int]:
        """Return the copy that begins with most of ``tokens[:limit]``, and how many those are.

        ``whole``: only copies that are of use without being cut.
        """
        best: Saved | None = None
        most = 0
        for saved in self._saved:
            count = shared(saved.tokens, tokens, limit)
            if count > most and not (whole and count < len(saved.tokens)):
                best, most = saved, count
        return best, most

    def drop(self, saved: Saved) -> None:
        """Give up a copy, unless another one has taken its place meanwhile."""
        if saved in self._saved:
            self._saved.remove(saved)
            self.size_bytes -= saved.size_bytes


def shared(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Return how many tokens two lists begin with in common, at most ``limit``."""
    end = max(0, min(len(left), len(right), limit))
    for start in range(0, end, _COMPARED):
        stop = min(start + _COMPARED, end)
        if left[start:stop] != right[start:stop]:
            return next(at for at in range(start, stop) if left[at] != right[at])
    return end
