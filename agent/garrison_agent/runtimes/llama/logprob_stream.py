"""Which tokens a piece of released text was made of. Pure."""

from __future__ import annotations

from collections import deque

from garrison_agent.runtimes.llama.generation import TokenLogprob


class LogprobStream:
    """Holds tokens back as long as their text is; positions count characters of the answer."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, int, TokenLogprob]] = deque()
        self._released = 0

    def push(self, logprob: TokenLogprob, text: str, held: int, *, stopped: bool) -> tuple[TokenLogprob, ...]:
        """Add a token after which ``text`` was released and ``held`` characters are held back.

        Returns the tokens of all text released so far, each once. ``stopped``: a stop string ends the answer here, and
        what was not released is not part of it.
        """
        start = self._held[-1][1] if self._held else self._released
        self._held.append((start, self._released + len(text) + held, logprob))
        return self._release(text, everything=False, stopped=stopped)

    def finish(self, text: str, *, stopped: bool) -> tuple[TokenLogprob, ...]:
        """Return the tokens of the ``text`` that came at the end, and of what never became a character."""
        return self._release(text, everything=True, stopped=stopped)

    def _release(self, text: str, *, everything: bool, stopped: bool) -> tuple[TokenLogprob, ...]:
        self._released += len(text)
        told = []
        while self._held:
            start, end, logprob = self._held[0]
            if not (start < self._released if stopped else everything or end <= self._released):
                break
            told.append(logprob)
            self._held.popleft()
        if stopped:
            self._held.clear()
        return tuple(told)
