"""The llama.cpp engine of a worker: decode thread, chat template, and the APIs for text put together.

Importing this loads the native library; the worker does so only after it has verified the files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from garrison_agent.runtimes.asgi import Application, Receive, Scope, Send
from garrison_agent.runtimes.llama.decode_thread import DecodeThread
from garrison_agent.runtimes.llama.native_backend import LlamaBackend
from garrison_agent.runtimes.llama.settings import read_settings
from garrison_agent.runtimes.ollama.api import PREFIX as OLLAMA_PREFIX
from garrison_agent.runtimes.ollama.api import OllamaApi
from garrison_agent.runtimes.openai.answers import TextModel
from garrison_agent.runtimes.openai.api import OpenAiApi
from garrison_agent.runtimes.openai.chat_template import ChatTemplate
from garrison_agent.runtimes.spec import WorkerOrder
from garrison_agent.runtimes.status import RequestRecord


async def load(order: WorkerOrder, record: Callable[[RequestRecord], None]) -> tuple[Application, dict[str, Any]]:
    """Return the application that serves the model, and the model's facts.

    Raises:
        InvalidError: ``model.load_failed``.
    """
    if order.settings.get("embedding") is True:
        from garrison_agent.runtimes.embeddings.engine import load as load_embedding

        return await load_embedding(order, record)
    settings = read_settings(order.settings)
    loaded: list[LlamaBackend] = []

    def load_backend() -> tuple[LlamaBackend, dict[str, Any]]:
        backend = LlamaBackend(
            order.files[0].native_path,
            threads=order.threads,
            context_length=order.context_length,
            parallel=order.parallel,
            settings=settings,
            files=order.files,
            adapter_settings=order.settings,
        )
        loaded.append(backend)
        return backend, {**backend.facts(), "template": backend.chat_template}

    loop = asyncio.get_running_loop()
    decode = DecodeThread(load_backend, loop, store_bytes=settings.prefix_cache_bytes)
    decode.start()
    template = ChatTemplate()
    await template.start()  # while the model is being loaded
    facts = await asyncio.wrap_future(decode.loaded)
    backend = loaded[0]
    source = facts.pop("template")
    if source is None:
        template.close()
    else:
        await template.load(source, begin_text=backend.begin_text, end_text=backend.end_text)
    begin_text = backend.begin_text if backend.begins_by_itself else ""
    model = TextModel(order.model_id, decode, template if source else None, begin_text=begin_text, record=record)
    return _text_api(OpenAiApi(model), OllamaApi(model)), facts


def _text_api(openai: Application, ollama: Application) -> Application:
    """Return the application that gives each request to the API whose path it names."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        api = ollama if scope["path"].startswith(OLLAMA_PREFIX) else openai
        await api(scope, receive, send)

    return answer
