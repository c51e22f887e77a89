"""``POST /v1/completions``: what follows a text, or each of several, streamed or whole."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable

from garrison_agent.runtimes.asgi import Receive, Scope, Send, send_json, start_event_stream
from garrison_agent.runtimes.llama.generation import Finish, TokenLogprob
from garrison_agent.runtimes.openai.answers import Answer, TextModel, read_request
from garrison_agent.runtimes.openai.api_errors import api_error
from garrison_agent.runtimes.openai.events import DONE, TEXT, Json, event, finite, frame, framed, token_text
from garrison_agent.runtimes.openai.requests import CompletionRequest, parse_request


class CompletionApi:
    """The handler of plain completions."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ApiError: It is refused, or failed before anything was sent.
        """
        model = self._model
        async with model.answering("completion", scope) as answer:
            request = parse_request(CompletionRequest, await read_request(receive))
            options = request.options(request.max_tokens, top_logprobs=request.top_logprobs)
            answer.begin(options, *request.prompts, copies=request.copies)
            async with model.running(answer, receive):
                if request.stream:
                    await self._stream(request, answer, send)
                else:
                    await self._whole(request, answer, send)

    async def _whole(self, request: CompletionRequest, answer: Answer, send: Send) -> None:
        choices = [_Choice(text, request.top_logprobs) for text in _beginnings(request)]
        async for index, text, finish, logprobs in answer.parts():
            choices[index].add(text, finish, logprobs)
        if answer.finish == "cancelled":
            return
        if answer.failure is not None:
            raise api_error(answer.failure)
        shown = [choice.shown(index) for index, choice in enumerate(choices)]
        head = {**_common(self._model.model_id), "choices": shown}
        await send_json(send, 200, {**head, "usage": answer.usage(), "timings": answer.timings()})

    async def _stream(self, request: CompletionRequest, answer: Answer, send: Send) -> None:
        """Send server-sent events. Everything but the text is encoded once, before the first token."""
        common = _common(self._model.model_id)
        usage: Json = {"usage": None} if request.include_usage else {}

        def chunk(index: int, text: str, finish: Finish | None = None, logprobs: Json | None = None) -> Json:
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
            return {**common, "choices": [choice], **usage}

        beginnings = _beginnings(request)
        frames = [frame(chunk(index, TEXT)) for index in range(len(beginnings))]
        logs = [Logprobs(request.top_logprobs or 0) for _ in frames]
        started = False
        async for index, text, finish, logprobs in answer.parts():
            out = b""
            if not started:
                started = True
                await start_event_stream(send)
                out = b"".join(event(chunk(each, start)) for each, start in enumerate(beginnings) if start)
            if logprobs:
                out += event(chunk(index, text, logprobs=logs[index].shown(logprobs)))
            elif text:
                out += framed(frames[index], text)
            if finish == "error":
                assert answer.failure is not None
                out += event(api_error(answer.failure).body()) + DONE
            elif finish in ("stop", "length"):
                out += event(chunk(index, "", finish))
                if answer.finish is not None:
                    if request.include_usage:
                        totals = {"usage": answer.usage(), "timings": answer.timings()}
                        out += event({**common, "choices": [], **totals})
                    out += DONE
            if out and finish != "cancelled":
                await send({"type": "http.response.body", "body": out, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class _Choice:
    """One answer that is given whole."""

    def __init__(self, beginning: str, top_logprobs: int | None) -> None:
        self._texts = [beginning]
        self._finish: Finish | None = None
        self._logprobs: list[TokenLogprob] = []
        self._top_logprobs = top_logprobs

    def add(self, text: str, finish: Finish | None, logprobs: Iterable[TokenLogprob]) -> None:
        """Take what it grew by."""
        self._texts.append(text)
        self._finish = finish
        self._logprobs += logprobs

    def shown(self, index: int) -> Json:
        """Return it as the item ``index`` of ``choices``."""
        top = self._top_logprobs
        logprobs = None if top is None else Logprobs(top).shown(self._logprobs)
        return {"index": index, "text": "".join(self._texts), "logprobs": logprobs, "finish_reason": self._finish}


class Logprobs:
    """The old form of log-probabilities; ``text_offset`` counts characters from the beginning of the answer."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def shown(self, tokens: Iterable[TokenLogprob]) -> Json:
        """Return ``logprobs`` for the next ``tokens``."""
        offsets, texts, values, alternatives = [], [], [], []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.piece))
            texts.append(token_text(token.piece))
            values.append(finite(token.logprob))
            alternatives.append({token_text(piece): finite(value) for piece, value in token.top})
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": alternatives if self._top else None,
            "text_offset": offsets,
        }


def _beginnings(request: CompletionRequest) -> list[str]:
    """Return what each choice begins with: its prompt, if it is to be repeated."""
    texts = [prompt if request.echo and isinstance(prompt, str) else "" for prompt in request.prompts]
    return [text for text in texts for _ in range(request.copies)]


def _common(model_id: str) -> Json:
    return {
        "id": "cmpl-" + secrets.token_hex(12),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model_id,
    }
