"""The one thread that touches a loaded embedding model. llama.cpp objects are never shared between threads."""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from garrison_agent.runtimes.embeddings.batching import Embedding, EmbeddingBackend, EmbeddingBatcher
from garrison_protocol.errors import GarrisonError

EXIT_BUG = 70
"""The worker's exit status when this thread met a bug (EX_SOFTWARE)."""


class EmbeddingThread(threading.Thread):
    """Owns the backend. ``loaded`` tells the model's facts, or why there is none."""

    def __init__(self, load: Callable[[], tuple[EmbeddingBackend, dict[str, Any]]]) -> None:
        super().__init__(daemon=True, name="embed")
        self.loaded: Future[dict[str, Any]] = Future()
        self._load = load
        self._wake = threading.Condition()
        self._incoming: deque[Embedding] = deque()
        self._batcher: EmbeddingBatcher | None = None

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._incoming) + (self._batcher.waiting if self._batcher is not None else 0)

    @property
    def steps(self) -> int:
        """Decode calls so far."""
        return self._batcher.steps if self._batcher is not None else 0

    def submit(self, request: Embedding) -> None:
        """Hand over a request; from any thread. ``on_done`` runs in this thread."""
        with self._wake:
            self._incoming.append(request)
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
        self._batcher = EmbeddingBatcher(backend)
        self.loaded.set_result(facts)
        try:
            while True:
                for request in self._take(wait=not self._batcher.busy):
                    self._batcher.add(request)
                self._batcher.step()
        except BaseException:
            self._die()
            raise

    def _take(self, *, wait: bool) -> list[Embedding]:
        with self._wake:
            while wait and not self._incoming:
                self._wake.wait()
            taken = list(self._incoming)
            self._incoming.clear()
        return taken

    def _die(self) -> None:
        """End the process: a worker whose thread is gone would accept requests and answer none."""
        traceback.print_exc()
        os._exit(EXIT_BUG)
