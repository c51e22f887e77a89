"""The llama.cpp engine of a worker: decode thread, chat template, and OpenAI API put together.

Importing this loads the native library; the worker does so only after it has verified the files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from garrison_agent.runtimes.asgi import Application
from garrison_agent.runtimes.chat_template import ChatTemplate
from garrison_agent.runtimes.decode_thread import DecodeThread
from garrison_agent.runtimes.llama_backend import LlamaBackend
from garrison_agent.runtimes.openai_api import OpenAiApi
from garrison_agent.runtimes.spec import WorkerOrder
from garrison_agent.runtimes.status import RequestRecord


async def load(order: WorkerOrder, record: Callable[[RequestRecord], None]) -> tuple[Application, dict[str, Any]]:
    """Return the application that serves the model, and the model's facts.

    Raises:
        InvalidError: ``model.load_failed``.
    """
    loaded: list[LlamaBackend] = []

    def load_backend() -> tuple[LlamaBackend, dict[str, Any]]:
        backend = LlamaBackend(
            order.files[0].native_path,
            threads=order.threads,
            context_length=order.context_length,
            parallel=order.parallel,
        )
        loaded.append(backend)
        return backend, {**backend.facts(), "template": backend.chat_template}

    decode = DecodeThread(load_backend, asyncio.get_running_loop().call_soon_threadsafe)
    decode.start()
    facts = await asyncio.wrap_future(decode.loaded)
    backend = loaded[0]
    source = facts.pop("template")
    template = None
    if source is not None:
        template = ChatTemplate(source, begin_text=backend.begin_text, end_text=backend.end_text)
    begin_text = backend.begin_text if backend.begins_by_itself else ""
    return OpenAiApi(order.model_id, decode, template, begin_text=begin_text, record=record), facts
