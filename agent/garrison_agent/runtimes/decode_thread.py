"""The one thread that touches a loaded language model: it loads it, decodes, and scores.

llama.cpp objects are never shared between threads. What the thread produces goes to the event loop with one wake-up
per flush for all answers together: the first token of an answer at once, then at most every ``FLUSH_S``.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from garrison_agent.runtimes.batching import Backend, Batcher, Generation, Output, Scoring
from garrison_protocol.errors import GarrisonError

FLUSH_S = 0.03
EXIT_BUG = 70
"""The worker's exit status when the decode thread met a bug (EX_SOFTWARE)."""

Post = Callable[[Callable[[list[Output]], None], list[Output]], Any]
"""How a batch of outputs reaches the event loop: ``loop.call_soon_threadsafe``."""


class DecodeThread(threading.Thread):
    """Owns the backend. ``loaded`` tells its backend's facts, or why there is none."""

    def __init__(self, load: Callable[[], tuple[Backend, dict[str, Any]]], post: Post) -> None:
        super().__init__(daemon=True, name="decode")
        self.loaded: Future[dict[str, Any]] = Future()
        self._load = load
        self._post = post
        self._wake = threading.Condition()
        self._incoming: deque[Generation | Scoring] = deque()
        self._batcher: Batcher | None = None

    @property
    def active(self) -> int:
        """Answers that hold a sequence now."""
        return self._batcher.active if self._batcher is not None else 0

    @property
    def queued(self) -> int:
        """Requests that wait for a sequence now."""
        return len(self._incoming) + (self._batcher.queued if self._batcher is not None else 0)

    def submit(self, work: Generation | Scoring) -> None:
        """Hand over a request; from any thread. Deltas arrive through ``post``; ``on_done`` runs in this thread."""
        with self._wake:
            self._incoming.append(work)
            self._wake.notify()

    def run(self) -> None:
        """Load, then serve for as long as the process lives."""
        try:
            backend, facts = self._load()
        except GarrisonError as error:
            self.loaded.set_exception(error)
            return
        except BaseException:
            self._die()
            raise
        self._batcher = Batcher(backend)
        self.loaded.set_result(facts)
        try:
            self._serve(self._batcher)
        except BaseException:
            self._die()
            raise

    def _serve(self, batcher: Batcher) -> None:
        pending: list[Output] = []
        flushed_at = 0.0
        while True:
            for work in self._take(wait=not batcher.busy):
                if isinstance(work, Scoring):
                    batcher.add_scoring(work)
                else:
                    pending.append(batcher.add(work))
            pending += batcher.step()
            now = time.monotonic()
            if pending and (now - flushed_at >= FLUSH_S or any(map(_urgent, pending))):
                self._post(_deliver, pending)
                pending, flushed_at = [], now

    def _take(self, *, wait: bool) -> list[Generation | Scoring]:
        with self._wake:
            while wait and not self._incoming:
                self._wake.wait()
            taken = list(self._incoming)
            self._incoming.clear()
        return taken

    def _die(self) -> None:
        """End the process: a worker whose decode thread is gone would accept requests and answer none."""
        traceback.print_exc()
        os._exit(EXIT_BUG)


def _urgent(output: Output) -> bool:
    """Tell whether somebody waits for exactly this: an acceptance, a first token, or the end."""
    generation, delta = output
    return delta.finish is not None or generation.completion_tokens <= 1


def _deliver(outputs: list[Output]) -> None:
    for generation, delta in outputs:
        generation.on_delta(delta)
