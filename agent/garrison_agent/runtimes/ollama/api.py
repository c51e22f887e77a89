"""Ollama's chat and generate over the decode thread: lines of JSON as the answer grows, or one object.

Durations are nanoseconds. ``prompt_eval_count`` counts the whole prompt, also what was known already. Source: Ollama,
docs/api.md.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from garrison_agent.runtimes.asgi import ClientGoneError, Receive, Scope, Send, send_json
from garrison_agent.runtimes.llama.generation import Options, TokenLogprob
from garrison_agent.runtimes.ollama.answers import Wording, line
from garrison_agent.runtimes.ollama.requests import ChatRequest, GenerateRequest, OllamaRequest
from garrison_agent.runtimes.openai.answers import Answer, TextModel, read_request
from garrison_agent.runtimes.openai.api_errors import ApiError, api_error
from garrison_agent.runtimes.openai.requests import parse_request
from garrison_agent.runtimes.openai.tokenizing import tokenize
from garrison_agent.runtimes.openai.tool_calls_grammar import ToolUse

PREFIX = "/api/"
_LOAD_HEADER = b"x-garrison-load-ms"
"""How long the agent waited for the model to be loaded before it passed the request on."""

More = Callable[[str], Awaitable[dict[str, Any]]]
"""What ends an answer besides its counts, from its whole text."""


class OllamaApi:
    """The ``/api`` paths of a text model."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            match scope["method"], scope["path"]:
                case "POST", "/api/chat":
                    await self._chat(scope, receive, send)
                case "POST", "/api/generate":
                    await self._generate(scope, receive, send)
                case "POST", "/api/embed" | "/api/embeddings":
                    await read_request(receive)  # the agent is still writing it, and would hear of a broken pipe
                    raise ApiError(
                        400, "inference.unsupported_endpoint", f"{self._model.model_id} does not support embeddings"
                    )
                case _, path:
                    raise ApiError(404, "inference.unknown_path", f"a text model's worker has no {path}")
        except ApiError as error:
            await send_json(send, error.status, {"error": error.message}, error.headers)
        except ClientGoneError:
            return

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._model.answering("chat", scope) as answer:
            request = parse_request(ChatRequest, await read_request(receive))
            use = request.tool_use
            options = await self._options(request, use)
            answer.begin(options, await self._model.chat_prompt(request.turns, tools=request.template_tools))
            wording = Wording(request.model, chat=True, tools=() if use is None else use.schemas)
            async with self._model.running(answer, receive):
                await _tell(request, answer, wording, send, load_ns=_load_ns(scope), more=_nothing_more)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._model.answering("completion", scope) as answer:
            request = parse_request(GenerateRequest, await read_request(receive))
            options = await self._options(request, None)
            text = await self._prompt(request)
            before = tuple(request.context or ())
            answer.begin(options, before + await self._following(text) if before else text)

            async def context(said: str) -> dict[str, Any]:
                """Return the conversation as tokens; with ``raw`` there is none."""
                if request.raw:
                    return {}
                both = text + said
                tokens = await self._following(both) if before else tuple(await tokenize(self._model.decode, both))
                return {"context": [*before, *tokens]}

            wording = Wording(request.model, chat=False)
            async with self._model.running(answer, receive):
                await _tell(request, answer, wording, send, load_ns=_load_ns(scope), more=context)

    async def _options(self, request: OllamaRequest, use: ToolUse | None) -> Options:
        """Return the engine's options.

        Raises:
            ApiError: Something in the request is not possible here.
        """
        held_to = await self._model.constraint(use=use, answer=request.wanted_schema, param="format")
        return request.to_options(self._model.context_length, held_to)

    async def _prompt(self, request: GenerateRequest) -> str:
        if request.raw:
            return request.prompt
        if self._model.template is None and not request.system:
            return request.prompt
        return await self._model.chat_prompt(request.turns)

    async def _following(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that others stand before, without the model's own beginning."""
        tokens = await tokenize(self._model.decode, text)
        begin = await tokenize(self._model.decode, "")
        return tuple(tokens[len(begin) :] if tokens[: len(begin)] == begin else tokens)


async def _tell(
    request: OllamaRequest, answer: Answer, wording: Wording, send: Send, *, load_ns: int, more: More
) -> None:
    """Send the answer as it grows, or whole.

    Raises:
        ApiError: It was refused before it began; or it failed, and nothing of it was sent.
    """
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    started = False
    async for part in answer.parts():
        if part.finish == "cancelled":
            return
        if part.finish == "error":
            assert answer.failure is not None
            error = api_error(answer.failure)
            if not started:
                raise error
            await send({"type": "http.response.body", "body": line({"error": error.message})})
            return
        texts.append(part.text)
        if not request.stream:
            logprobs.extend(part.logprobs)
            continue
        if not started:
            started = True
            await _start(send)
        out = wording.lines(part.text, part.logprobs, last=part.finish is not None)
        if out:
            await send({"type": "http.response.body", "body": out, "more_body": True})
    whole = "".join(texts)
    facts = {"done_reason": answer.finish, **await more(whole), **_counts(answer, load_ns)}
    if request.stream:
        await send({"type": "http.response.body", "body": line(wording.last("", (), (), facts))})
    else:
        text, calls = wording.take(whole, last=True)
        await send_json(send, 200, wording.last(text, calls, logprobs, facts))


def _counts(answer: Answer, load_ns: int) -> dict[str, int]:
    """Return how long what took. Waiting for a place counts as reading the prompt."""
    now = time.monotonic()
    first, last = answer.first_token_at or now, answer.last_token_at or now
    return {
        "total_duration": load_ns + _ns(now - answer.began),
        "load_duration": load_ns,
        "prompt_eval_count": answer.prompt_tokens,
        "prompt_eval_duration": _ns(first - answer.began),
        "eval_count": answer.completion_tokens,
        "eval_duration": _ns(last - first),
    }


def _load_ns(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == _LOAD_HEADER and value.isdigit() and len(value) <= 12:
            return int(value) * 1_000_000
    return 0


def _ns(seconds: float) -> int:
    return max(0, int(seconds * 1e9))


async def _nothing_more(_text: str) -> dict[str, Any]:
    return {}


async def _start(send: Send) -> None:
    headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
