"""The one thread that touches a loaded language model: it loads it, decodes, and scores.

llama.cpp objects are never shared between threads. What the thread produces goes to the event loop with one wake-up
per flush for all answers together: the first token of an answer at once, then at most every ``FLUSH_S``.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from garrison_agent.runtimes.llama.backend import Backend
from garrison_agent.runtimes.llama.batching import PREFIX_STORE_BYTES, Batcher
from garrison_agent.runtimes.llama.generation import Generation, Output, Scoring
from garrison_protocol.errors import GarrisonError

FLUSH_S = 0.03
ALARM_LATE_S = 0.002
EXIT_BUG = 70
"""The worker's exit status when the decode thread met a bug (EX_SOFTWARE)."""


class Errand(Protocol):
    """A question to the loaded model that no batch is needed for."""

    def run(self, backend: Backend) -> None:
        """Do it, in the decode thread, between two steps."""


Work = Generation | Scoring | Errand


class DecodeThread(threading.Thread):
    """Owns the backend. ``loaded`` tells its backend's facts, or why there is none.

    Requests come from the event loop ``loop``, and their answers go there.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Backend, dict[str, Any]]],
        loop: asyncio.AbstractEventLoop,
        *,
        store_bytes: int = PREFIX_STORE_BYTES,
    ) -> None:
        super().__init__(daemon=True, name="decode")
        self.loaded: Future[dict[str, Any]] = Future()
        self._load = load
        self._loop = loop
        self._store_bytes = store_bytes
        self._wake = threading.Condition()
        self._incoming: deque[Work] = deque()
        self._batcher: Batcher | None = None
        self.context_length = 0
        """Tokens that one request may fill; known once the model is loaded."""
        self.steps = 0
        """Decoding steps so far: whether this thread gets on."""
        self._alarms: dict[Generation, asyncio.TimerHandle] = {}
        """Of the requests with a deadline; the event loop's."""

    @property
    def active(self) -> int:
        """Answers that hold a sequence now."""
        return self._batcher.active if self._batcher is not None else 0

    @property
    def queued(self) -> int:
        """Requests that wait for a sequence now."""
        return len(self._incoming) + (self._batcher.queued if self._batcher is not None else 0)

    def submit(self, work: Work) -> None:
        """Hand over a request, in the event loop. Deltas arrive there; ``on_done`` and errands run in this thread."""
        if isinstance(work, (Generation, Scoring)):
            work.on_cancel = self._look
        if isinstance(work, Generation) and work.deadline_s is not None:
            # A little later, so that the deadline has passed by every clock.
            self._alarms[work] = self._loop.call_later(work.deadline_s - time.monotonic() + ALARM_LATE_S, self._look)
        with self._wake:
            self._incoming.append(work)
            self._wake.notify()

    def _look(self) -> None:
        """Somebody left or ran out of time: stop what is being read for nobody."""
        if self._batcher is not None:
            self._batcher.poke()

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
        self._batcher = Batcher(backend, store_bytes=self._store_bytes)
        self.context_length = backend.context_length
        self.loaded.set_result(facts)
        try:
            self._serve(self._batcher, backend)
        except BaseException:
            self._die()
            raise

    def _serve(self, batcher: Batcher, backend: Backend) -> None:
        pending: list[Output] = []
        flushed_at = 0.0
        while True:
            for work in self._take(wait=not batcher.busy):
                if isinstance(work, Generation):
                    pending.append(batcher.add(work))
                elif isinstance(work, Scoring):
                    batcher.add_scoring(work)
                else:
                    work.run(backend)
            pending += batcher.step()
            self.steps += 1
            now = time.monotonic()
            if pending and (now - flushed_at >= FLUSH_S or any(map(_urgent, pending))):
                self._loop.call_soon_threadsafe(self._deliver, pending)
                pending, flushed_at = [], now

    def _deliver(self, outputs: list[Output]) -> None:
        """Tell the owners; in the event loop."""
        for generation, delta in outputs:
            if delta.finish is not None and self._alarms:
                alarm = self._alarms.pop(generation, None)
                if alarm is not None:
                    alarm.cancel()
            generation.on_delta(delta)

    def _take(self, *, wait: bool) -> list[Work]:
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
