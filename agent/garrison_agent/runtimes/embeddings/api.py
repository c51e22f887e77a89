"""The APIs of an embedding model: OpenAI's ``/v1/embeddings``, Ollama's ``/api/embed`` and ``/api/embeddings``.

Vectors have length one everywhere. An input beyond the model's context is an error, but where Ollama's ``truncate``
says otherwise (it does by default). Runs in the event loop. Paths under ``/internal`` are the gate's, without records.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from garrison_agent.runtimes.asgi import ClientGoneError, Receive, Scope, Send, on_disconnect, send_body, send_json
from garrison_agent.runtimes.embeddings.batching import Embedding, Input, Vector, normalised
from garrison_agent.runtimes.embeddings.requests import EmbeddingRequest, OllamaEmbedRequest, OllamaOlderRequest
from garrison_agent.runtimes.embeddings.thread import EmbeddingThread
from garrison_agent.runtimes.openai.answers import INTERNAL, read_request, request_terms
from garrison_agent.runtimes.openai.api_errors import ApiError, api_error
from garrison_agent.runtimes.openai.requests import parse_request
from garrison_agent.runtimes.spec import Settings
from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol.errors import GarrisonError

_DISCONNECTED = "inference.client_disconnected"
_CLIENT_LEFT = 499
_LOAD_HEADER = b"x-garrison-load-ms"
_TEXT_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/api/chat", "/api/generate"})
_PATHS = frozenset({"/v1/embeddings", "/api/embed", "/api/embeddings", "/health"})


class EmbeddingApi:
    """The ASGI application of an embedding model."""

    def __init__(
        self,
        model_id: str,
        thread: EmbeddingThread,
        settings: Settings,
        facts: Mapping[str, Any],
        *,
        record: Callable[[RequestRecord], None],
    ) -> None:
        """``settings["matryoshka"]``: true, or the lengths to which vectors may be cut, as text with commas."""
        self._model_id = model_id
        self._thread = thread
        self._matryoshka = settings.get("matryoshka")
        self._dimensions: int = facts["dimensions"]
        self._record = record
        self._done = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path: str = scope["path"]
        internal = path.startswith(INTERNAL + "/")
        known = path.removeprefix(INTERNAL) if internal else path
        try:
            match scope["method"], known:
                case "POST", "/v1/embeddings":
                    await self._openai(scope, receive, send)
                case "POST", "/api/embed":
                    await self._ollama(scope, receive, send)
                case "POST", "/api/embeddings":
                    await self._ollama_older(scope, receive, send)
                case "GET", "/health":
                    await send_json(send, 200, self._health())
                case "POST", text if text in _TEXT_PATHS:
                    await read_request(receive)  # the agent is still writing it, and would hear of a broken pipe
                    raise ApiError(
                        400,
                        "inference.unsupported_endpoint",
                        f"{self._model_id} makes embeddings; it generates no text",
                    )
                case _, other if other in _PATHS:
                    raise ApiError(405, "inference.method_not_allowed", f"{other} takes another method")
                case _:
                    raise ApiError(404, "inference.unknown_path", f"an embedding model's worker has no {path}")
        except ApiError as error:
            body = {"error": error.message} if known.startswith("/api/") else error.body()
            await send_json(send, error.status, body, error.headers)
        except ClientGoneError:
            return

    def _health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "model": self._model_id,
            "active": int(self._thread.waiting > 0),
            "queued": max(0, self._thread.waiting - 1),
            "requests": self._done,
            "steps": self._thread.steps,
        }

    async def _openai(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = _Asked(scope)
        async with _Recorded(self, asked):
            request = parse_request(EmbeddingRequest, await read_request(receive))
            self._check_dimensions(request.dimensions)
            vectors = await self._vectors(asked, request.inputs, receive, dimensions=request.dimensions)
            tokens = asked.prompt_tokens
            await _send(send, lambda: self._openai_answer(request, vectors, tokens))

    def _openai_answer(self, request: EmbeddingRequest, vectors: list[Vector], tokens: int) -> dict[str, Any]:
        form = _base64 if request.encoding_format == "base64" else _floats
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": form(vector)}
                for index, vector in enumerate(vectors)
            ],
            "model": self._model_id,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    async def _ollama(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = _Asked(scope)
        async with _Recorded(self, asked):
            request = parse_request(OllamaEmbedRequest, await read_request(receive))
            vectors = await self._ollama_vectors(asked, request, receive)
            load_ns = _load_ns(scope)
            answer = {
                "model": request.model,
                "total_duration": load_ns + round((time.monotonic() - asked.began) * 1e9),
                "load_duration": load_ns,
                "prompt_eval_count": asked.prompt_tokens,
            }
            await _send(send, lambda: {**answer, "embeddings": [_floats(vector) for vector in vectors]})

    async def _ollama_older(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = _Asked(scope)
        async with _Recorded(self, asked):
            request = parse_request(OllamaOlderRequest, await read_request(receive))
            vectors = await self._ollama_vectors(asked, request, receive)
            await _send(send, lambda: {"embedding": _floats(vectors[0]) if vectors else []})

    async def _ollama_vectors(
        self, asked: _Asked, request: OllamaEmbedRequest | OllamaOlderRequest, receive: Receive
    ) -> list[Vector]:
        self._check_dimensions(request.dimensions)
        if not request.inputs:
            return []
        return await self._vectors(
            asked, request.inputs, receive, dimensions=request.dimensions, truncate=request.truncate
        )

    def _check_dimensions(self, dimensions: int | None) -> None:
        """Raise ``ApiError`` unless a vector of this model still means something when it is cut to ``dimensions``."""
        if dimensions is None or dimensions == self._dimensions:
            return
        allowed: set[int] = set()
        if self._matryoshka is True:
            allowed = set(range(1, self._dimensions))
        elif isinstance(self._matryoshka, str):
            allowed = {int(part) for part in self._matryoshka.split(",") if part.strip().isdecimal()}
        if dimensions not in allowed or dimensions > self._dimensions:
            raise ApiError(
                400,
                "inference.unsupported_parameter",
                f"dimensions: the vectors of {self._model_id} have {self._dimensions} values and are not cut to that",
                param="dimensions",
            )

    async def _vectors(
        self,
        asked: _Asked,
        inputs: tuple[Input, ...],
        receive: Receive,
        *,
        dimensions: int | None,
        truncate: bool = False,
    ) -> list[Vector]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[Vector] | GarrisonError] = loop.create_future()

        def settle(value: list[Vector] | GarrisonError) -> None:
            if not result.done():
                result.set_result(value)

        def done(value: list[Vector] | GarrisonError) -> None:
            loop.call_soon_threadsafe(settle, value)

        work = Embedding(
            inputs,
            done,
            truncate=truncate,
            deadline_s=asked.deadline_s,
        )

        def cancel() -> None:
            work.cancelled = True
            result.cancel()

        try:
            async with on_disconnect(receive, cancel):
                self._thread.submit(work)
                value = await result
        except asyncio.CancelledError:
            if not work.cancelled:
                work.cancelled = True
                raise
            asked.left = True
            raise ClientGoneError from None
        asked.prompt_tokens = work.prompt_tokens
        if isinstance(value, GarrisonError):
            raise api_error(value, param="input")
        try:
            return [normalised(vector, dimensions) for vector in value]
        except GarrisonError as error:
            raise api_error(error) from error

    def record(self, asked: _Asked, error: ApiError | None) -> None:
        """Count a request and report it."""
        self._done += 1
        if asked.internal:
            return
        self._record(
            RequestRecord(
                "embedding",
                ok=error is None,
                error_code=_DISCONNECTED if asked.left else None if error is None else error.code,
                prompt_tokens=asked.prompt_tokens,
                duration_ms=round((time.monotonic() - asked.began) * 1000, 3),
                status=_CLIENT_LEFT if asked.left else 200 if error is None else error.status,
                app=asked.app,
            )
        )


class _Asked:
    """One request, as far as its record needs it."""

    def __init__(self, scope: Scope) -> None:
        self.began = time.monotonic()
        self.internal = scope["path"].startswith(INTERNAL + "/")
        self.prompt_tokens = 0
        self.left = False
        self.app, self.deadline_s = request_terms(scope, self.began)


class _Recorded:
    """Records a request at the end of the block."""

    def __init__(self, api: EmbeddingApi, asked: _Asked) -> None:
        self._api = api
        self._asked = asked

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ClientGoneError):
            self._asked.left = True
        self._api.record(self._asked, error if isinstance(error, ApiError) else None)


async def _send(send: Send, build: Callable[[], dict[str, Any]]) -> None:
    """Send a JSON answer that is built and written in a thread: thousands of vectors take a while."""
    await send_body(send, 200, await asyncio.to_thread(lambda: json.dumps(build(), separators=(",", ":")).encode()))


def _floats(vector: Vector) -> list[float]:
    # Nine significant digits are all of a float32; Python would write seventeen.
    return [float(f"{value:.9g}") for value in vector.tolist()]


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def _load_ns(scope: Scope) -> int:
    value = dict(scope.get("headers", ())).get(_LOAD_HEADER, b"0")
    return int(value) * 1_000_000 if value.isdigit() and len(value) < 12 else 0
