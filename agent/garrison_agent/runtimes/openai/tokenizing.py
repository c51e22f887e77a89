"""Text to tokens, for whoever counts or keeps them: the decode thread does it between two steps, and no sooner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from garrison_agent.runtimes.asgi import Receive, Send, send_json
from garrison_agent.runtimes.llama.backend import Backend
from garrison_agent.runtimes.openai.api_errors import api_error
from garrison_protocol.errors import GarrisonError

if TYPE_CHECKING:
    from garrison_agent.runtimes.llama.decode_thread import DecodeThread
    from garrison_agent.runtimes.openai.answers import TextModel

COUNT_PATH = "/v1/chat/completions/tokenizer/encode/count"
"""Foundry Local's path."""


@dataclass(eq=False)
class Tokenizing:
    """A text whose tokens somebody wants; ``on_done`` gets them in the decode thread."""

    text: str
    on_done: Callable[[list[int] | GarrisonError], None]

    def run(self, backend: Backend) -> None:
        """Tokenise the text."""
        try:
            self.on_done(backend.tokenize(self.text))
        except GarrisonError as error:
            self.on_done(error)


async def tokenize(decode: DecodeThread, text: str) -> list[int]:
    """Return the tokens of ``text``, with the model's own beginning.

    Raises:
        ApiError: The tokenizer does not take this text.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[list[int] | GarrisonError] = loop.create_future()

    def settle(value: list[int] | GarrisonError) -> None:
        if not result.done():  # who asked may have been cancelled
            result.set_result(value)

    def done(value: list[int] | GarrisonError) -> None:
        loop.call_soon_threadsafe(settle, value)

    decode.submit(Tokenizing(text, done))
    value = await result
    if isinstance(value, GarrisonError):
        raise api_error(value)
    return value


async def count_tokens(model: TextModel, receive: Receive, send: Send) -> None:
    """Answer with how many tokens the prompt of a chat request has, without answering it.

    Raises:
        ApiError: The request is not valid.
    """
    from garrison_agent.runtimes.openai.answers import read_request
    from garrison_agent.runtimes.openai.chat_requests import ChatRequest
    from garrison_agent.runtimes.openai.requests import parse_request

    request = parse_request(ChatRequest, await read_request(receive))
    prompt = await model.chat_prompt(request.turns, tools=request.template_tools)
    await send_json(send, 200, {"tokenCount": len(await tokenize(model.decode, prompt))})
