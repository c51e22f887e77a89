"""The ASGI application of a text model: which path is whose, and the gate's own questions.

Runs in the event loop. Paths under ``/internal`` are the agent's own (the gate): the same answers, but no request
records. The local API never forwards them.
"""

from __future__ import annotations

import asyncio
import math

from garrison_agent.runtimes.asgi import ClientGoneError, Receive, Scope, Send, on_disconnect, send_json
from garrison_agent.runtimes.llama.generation import Scoring
from garrison_agent.runtimes.openai.answers import INTERNAL, TextModel, read_request
from garrison_agent.runtimes.openai.api_errors import ApiError, api_error
from garrison_agent.runtimes.openai.chat import ChatApi
from garrison_agent.runtimes.openai.completions import CompletionApi
from garrison_agent.runtimes.openai.requests import ScoreRequest, parse_request
from garrison_agent.runtimes.openai.responses_api import ResponsesApi
from garrison_agent.runtimes.openai.tokenizing import COUNT_PATH, count_tokens
from garrison_protocol.errors import GarrisonError

_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/health"})


class OpenAiApi:
    """Answers every request to a text model's worker."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._chat = ChatApi(model)
        self._completions = CompletionApi(model)
        self._responses = ResponsesApi(model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path: str = scope["path"]
        try:
            match scope["method"], path.removeprefix(INTERNAL):
                case "POST", "/v1/chat/completions":
                    await self._chat.complete(scope, receive, send)
                case "POST", "/v1/completions":
                    await self._completions.complete(scope, receive, send)
                case "POST", "/v1/responses":
                    await self._responses.respond(scope, receive, send)
                case "POST", known if known == COUNT_PATH:
                    await count_tokens(self._model, receive, send)
                case "POST", "/score" if path.startswith(INTERNAL + "/"):
                    await self._score(receive, send)
                case "POST", "/v1/embeddings":
                    await read_request(receive)  # the agent is still writing it, and would hear of a broken pipe
                    raise ApiError(
                        400,
                        "inference.unsupported_endpoint",
                        f"{self._model.model_id} generates text; it makes no embeddings",
                    )
                case "GET", "/health":
                    await send_json(send, 200, self._model.health())
                case _, known if known in _PATHS:
                    raise ApiError(405, "inference.method_not_allowed", f"{known} takes another method")
                case _:
                    raise ApiError(404, "inference.unknown_path", f"a text model's worker has no {path}")
        except ApiError as error:
            await send_json(send, error.status, error.body(), error.headers)
        except ClientGoneError:
            return

    async def _score(self, receive: Receive, send: Send) -> None:
        request = parse_request(ScoreRequest, await read_request(receive))
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[float] | GarrisonError] = loop.create_future()

        def settle(value: list[float] | GarrisonError) -> None:
            if not result.done():
                result.set_result(value)

        def done(value: list[float] | GarrisonError) -> None:
            loop.call_soon_threadsafe(settle, value)

        scoring = Scoring(request.prompt, request.choices, done)

        def cancel() -> None:
            scoring.cancel()
            result.cancel()

        async with on_disconnect(receive, cancel):
            self._model.decode.submit(scoring)
            try:
                value = await result
            except asyncio.CancelledError:
                if scoring.cancelled:
                    raise ClientGoneError from None
                raise
        if isinstance(value, GarrisonError):
            raise api_error(value)
        # JSON has no NaN: a choice without a probability is null.
        await send_json(send, 200, {"logprobs": [mean if math.isfinite(mean) else None for mean in value]})
