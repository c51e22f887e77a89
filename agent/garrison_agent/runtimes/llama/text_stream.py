"""From token bytes to text that may be shown: whole characters only, and nothing of a stop string. Pure."""

from __future__ import annotations

import codecs


class TextStream:
    """Assembles one answer. ``stopped`` turns true when one of the ``stop`` strings appeared; it is not part of it."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    @property
    def held_characters(self) -> int:
        """How much text waits to become certain."""
        return len(self._held)

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; return the text that is now certain."""
        text = self._decoder.decode(piece)
        if not self._stop:
            return text
        return self._release(self._held + text)

    def finish(self) -> str:
        """Return what was held back, once no more tokens come."""
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        released = self._release(text)
        if not self.stopped:
            released, self._held = released + self._held, ""
        return released

    def _release(self, text: str) -> str:
        """Keep back the longest end of ``text`` that may become a stop string; return the rest."""
        # The stop that is complete first counts, so that the cut does not depend on how the text came in pieces.
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins, ``stop`` itself excluded."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
