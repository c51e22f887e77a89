"""OpenAI's chat and plain completions over the decode thread, streamed or whole. Runs in the event loop.

Paths under ``/internal`` are the agent's own (the gate): the same answers, but no request records. The local API
never forwards them.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from garrison_agent.runtimes.asgi import (
    BodyTooLargeError,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    on_disconnect,
    read_body,
    send_json,
    start_event_stream,
)
from garrison_agent.runtimes.batching import Delta, Finish, Generation, Scoring
from garrison_agent.runtimes.chat_template import ChatTemplate
from garrison_agent.runtimes.decode_thread import DecodeThread
from garrison_agent.runtimes.openai_requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    ScoreRequest,
    TextRequest,
    parse_request,
)
from garrison_agent.runtimes.status import RequestKind, RequestRecord
from garrison_protocol.errors import GarrisonError, InvalidError, UnavailableError

INTERNAL = "/internal"
_DISCONNECTED = "inference.client_disconnected"
_CLIENT_LEFT = 499
"""The status in records when the client went away first (nginx's number; it never reaches anybody)."""


@dataclass(frozen=True)
class _Form:
    """How the two endpoints name things in their answers."""

    kind: RequestKind
    object: str
    chunk_object: str
    id_prefix: str


_CHAT = _Form("chat", "chat.completion", "chat.completion.chunk", "chatcmpl-")
_PLAIN = _Form("completion", "text_completion", "text_completion", "cmpl-")


class OpenAiApi:
    """The ASGI application of a text model."""

    def __init__(
        self,
        model_id: str,
        decode: DecodeThread,
        template: ChatTemplate | None,
        *,
        begin_text: str,
        record: Callable[[RequestRecord], None],
    ) -> None:
        """``begin_text`` is what the tokenizer adds by itself, so that a template's own copy is left out."""
        self._model_id = model_id
        self._decode = decode
        self._template = template
        self._begin_text = begin_text
        self._record = record
        self._done = 0
        self._tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path: str = scope["path"]
        internal = path.startswith(INTERNAL + "/")
        try:
            match scope["method"], path.removeprefix(INTERNAL):
                case "POST", "/v1/chat/completions":
                    await self._complete(_CHAT, receive, send, recorded=not internal)
                case "POST", "/v1/completions":
                    await self._complete(_PLAIN, receive, send, recorded=not internal)
                case "POST", "/score" if internal:
                    await self._score(receive, send)
                case "POST", "/v1/embeddings":
                    raise ApiError(
                        400,
                        "inference.unsupported_endpoint",
                        f"{self._model_id} generates text; it makes no embeddings",
                    )
                case "GET", "/health":
                    await send_json(send, 200, self._health())
                case _, known if known in _PATHS:
                    raise ApiError(405, "inference.method_not_allowed", f"{known} takes another method")
                case _:
                    raise ApiError(404, "inference.unknown_path", f"a text model's worker has no {path}")
        except ApiError as error:
            await send_json(send, error.status, error.body())
        except ClientGoneError:
            return

    def _health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "model": self._model_id,
            "active": self._decode.active,
            "queued": self._decode.queued,
            "requests": self._done,
            "completion_tokens": self._tokens,
        }

    async def _complete(self, form: _Form, receive: Receive, send: Send, *, recorded: bool) -> None:
        answer = _Answer()
        error: ApiError | None = None
        try:
            request, prompt, max_tokens = self._parse(form, await _body(receive))
            answer.begin(prompt, request, max_tokens)
            async with on_disconnect(receive, answer.cancel):
                self._decode.submit(answer.generation)
                if request.stream:
                    await self._stream(form, request, answer, send)
                else:
                    await self._whole(form, answer, send)
        except ApiError as caught:
            error = caught
            raise
        finally:
            self._done += 1
            if answer.started:
                answer.cancel()
                self._tokens += answer.generation.completion_tokens
            if recorded:
                self._record(_to_record(form.kind, answer, error))

    def _parse(self, form: _Form, body: bytes) -> tuple[TextRequest, str, int | None]:
        if form is _PLAIN:
            plain = parse_request(CompletionRequest, body)
            return plain, plain.text, plain.max_tokens
        chat = parse_request(ChatRequest, body)
        if self._template is None:
            raise ApiError(
                400,
                "inference.no_chat_template",
                f"{self._model_id} has no chat template; use /v1/completions",
            )
        try:
            prompt = self._template.render(chat.turns)
        except InvalidError as error:
            raise _api_error(error, param="messages") from error
        if self._begin_text:
            prompt = prompt.removeprefix(self._begin_text)
        return chat, prompt, chat.max_completion_tokens or chat.max_tokens

    async def _whole(self, form: _Form, answer: _Answer, send: Send) -> None:
        parts = [text async for text, _ in answer.parts()]
        generation = answer.generation
        if answer.finish == "cancelled":
            return
        if generation.error is not None:
            raise _api_error(generation.error)
        text = "".join(parts)
        choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish, "logprobs": None}
        if form is _CHAT:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        await send_json(
            send,
            200,
            {
                "id": form.id_prefix + secrets.token_hex(12),
                "object": form.object,
                "created": int(time.time()),
                "model": self._model_id,
                "choices": [choice],
                "usage": _usage(generation),
                "timings": answer.timings(),
            },
        )

    async def _stream(self, form: _Form, request: TextRequest, answer: _Answer, send: Send) -> None:
        """Send server-sent events. Everything but the text is encoded once, before the first token."""
        common = {
            "id": form.id_prefix + secrets.token_hex(12),
            "object": form.chunk_object,
            "created": int(time.time()),
            "model": self._model_id,
        }
        usage = {"usage": None} if request.include_usage else {}
        head, tail = _text_frame(form, common, usage)
        first = True
        async for text, finish in answer.parts():
            out = b""
            if first:
                first = False
                await start_event_stream(send)
                if form is _CHAT:
                    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    out = _event({**common, "choices": [role], **usage})
            if text:
                out += head + encode_basestring_ascii(text).encode("ascii") + tail
            if finish == "error":
                assert answer.generation.error is not None
                out += _event(_api_error(answer.generation.error).body()) + b"data: [DONE]\n\n"
            elif finish in ("stop", "length"):
                empty: dict[str, Any] = {"delta": {}} if form is _CHAT else {"text": ""}
                out += _event({**common, "choices": [{"index": 0, **empty, "finish_reason": finish}], **usage})
                if request.include_usage:
                    totals = {"usage": _usage(answer.generation), "timings": answer.timings()}
                    out += _event({**common, "choices": [], **totals})
                out += b"data: [DONE]\n\n"
            if out and finish != "cancelled":
                await send({"type": "http.response.body", "body": out, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _score(self, receive: Receive, send: Send) -> None:
        request = parse_request(ScoreRequest, await _body(receive))
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[float] | GarrisonError] = loop.create_future()

        def settle(value: list[float] | GarrisonError) -> None:
            if not result.done():
                result.set_result(value)

        def done(value: list[float] | GarrisonError) -> None:
            loop.call_soon_threadsafe(settle, value)

        scoring = Scoring(request.prompt, request.choices, done)

        def cancel() -> None:
            scoring.cancelled = True
            result.cancel()

        async with on_disconnect(receive, cancel):
            self._decode.submit(scoring)
            try:
                value = await result
            except asyncio.CancelledError:
                if scoring.cancelled:
                    raise ClientGoneError from None
                raise
        if isinstance(value, GarrisonError):
            raise _api_error(value)
        # JSON has no NaN: a choice without a probability is null.
        await send_json(send, 200, {"logprobs": [mean if math.isfinite(mean) else None for mean in value]})


_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/health"})


class _Answer:
    """The event loop's side of one generation."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.finish: Finish | None = None
        self.started = False
        self.generation: Generation
        self._deltas: list[Delta] = []
        self._news = asyncio.Event()

    def begin(self, prompt: str, request: TextRequest, max_tokens: int | None) -> None:
        """Make the generation that the decode thread will run."""
        self.generation = Generation(prompt, request.options(max_tokens), self._hear)
        self.started = True

    def cancel(self) -> None:
        """Stop the generation before its next token; nobody reads on."""
        if self.started and self.finish is None:
            self.generation.cancelled = True
            self._hear(Delta("", "cancelled"))

    def _hear(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._news.set()

    async def parts(self) -> AsyncIterator[tuple[str, Finish | None]]:
        """Yield the answer as it grows, several tokens together when they came together.

        Raises:
            ApiError: The request was refused before it began. A later failure is the finish ``error``.
        """
        accepted = False
        while self.finish is None:
            await self._news.wait()
            self._news.clear()
            deltas, self._deltas = self._deltas, []
            self.finish = next((delta.finish for delta in deltas if delta.finish is not None), None)
            if self.finish == "error" and not accepted:
                assert self.generation.error is not None
                raise _api_error(self.generation.error)
            accepted = True
            yield "".join(delta.text for delta in deltas), self.finish

    def timings(self) -> dict[str, float | None]:
        """Return the measured times: ``ttft_ms`` from the request's arrival, ``tokens_per_s`` after the first token."""
        if not self.started or self.generation.first_token_at is None or self.generation.last_token_at is None:
            return {"ttft_ms": None, "tokens_per_s": None}
        generation, first, last = self.generation, self.generation.first_token_at, self.generation.last_token_at
        after_first = generation.completion_tokens - 1
        rate = round(after_first / (last - first), 3) if after_first > 0 and last > first else None
        return {"ttft_ms": round((first - self.began) * 1000, 3), "tokens_per_s": rate}


def _to_record(kind: RequestKind, answer: _Answer, error: ApiError | None) -> RequestRecord:
    """Return what happened, once the answer ended, was refused, or was left by its client."""
    if error is None and answer.started and answer.generation.error is not None:
        error = _api_error(answer.generation.error)
    left = error is None and answer.finish not in ("stop", "length")
    generation = answer.generation if answer.started else None
    timings = answer.timings()
    return RequestRecord(
        kind,
        ok=error is None,
        error_code=_DISCONNECTED if left else None if error is None else error.code,
        prompt_tokens=generation.prompt_tokens if generation else 0,
        completion_tokens=generation.completion_tokens if generation else 0,
        ttft_ms=timings["ttft_ms"],
        duration_ms=round((time.monotonic() - answer.began) * 1000, 3),
        tokens_per_s=timings["tokens_per_s"],
        status=_CLIENT_LEFT if left else 200 if error is None else error.status,
    )


def _api_error(error: GarrisonError, *, param: str | None = None) -> ApiError:
    status = 400 if isinstance(error, InvalidError) else 503 if isinstance(error, UnavailableError) else 500
    return ApiError(status, error.code, error.message, param=param)


async def _body(receive: Receive) -> bytes:
    try:
        return await read_body(receive)
    except BodyTooLargeError:
        raise ApiError(413, "inference.body_too_large", "the request is longer than 16 MiB") from None


def _usage(generation: Generation) -> dict[str, Any]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _text_frame(form: _Form, common: dict[str, Any], usage: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return what stands before and after the quoted text in each event."""
    mark = "@text@"
    content: dict[str, Any] = {"delta": {"content": mark}} if form is _CHAT else {"text": mark}
    choice = {"index": 0, **content, "finish_reason": None}
    head, _, tail = _event({**common, "choices": [choice], **usage}).rpartition(json.dumps(mark).encode())
    return head, tail
