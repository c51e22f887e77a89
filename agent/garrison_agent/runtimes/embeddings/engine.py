"""The embedding engine of a worker: a GGUF model whose answers are vectors. ``llama.engine`` hands over to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from garrison_agent.runtimes.asgi import Application
from garrison_agent.runtimes.embeddings.api import EmbeddingApi
from garrison_agent.runtimes.embeddings.backend import LlamaEmbeddingBackend
from garrison_agent.runtimes.embeddings.thread import EmbeddingThread
from garrison_agent.runtimes.spec import WorkerOrder
from garrison_agent.runtimes.status import RequestRecord


async def load(order: WorkerOrder, record: Callable[[RequestRecord], None]) -> tuple[Application, dict[str, Any]]:
    """Return the application that serves the model, and the model's facts.

    Raises:
        InvalidError: ``model.load_failed``.
    """

    def load_backend() -> tuple[LlamaEmbeddingBackend, dict[str, Any]]:
        backend = LlamaEmbeddingBackend(
            order.files[0].native_path,
            threads=order.threads,
            context_length=order.context_length,
            settings=order.settings,
        )
        return backend, backend.facts()

    thread = EmbeddingThread(load_backend)
    thread.start()
    facts = await asyncio.wrap_future(thread.loaded)
    return EmbeddingApi(order.model_id, thread, order.settings, facts, record=record), facts
