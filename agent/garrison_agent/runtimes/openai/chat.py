"""``POST /v1/chat/completions``: answers with text, tool calls, or both, streamed or whole."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from garrison_agent.runtimes.asgi import Receive, Scope, Send, send_json, start_event_stream
from garrison_agent.runtimes.llama.generation import Finish, TokenLogprob
from garrison_agent.runtimes.openai.answers import Answer, Part, TextModel, read_request
from garrison_agent.runtimes.openai.api_errors import api_error
from garrison_agent.runtimes.openai.chat_requests import ChatRequest
from garrison_agent.runtimes.openai.events import DONE, TEXT, Json, event, finite, frame, framed, token_text
from garrison_agent.runtimes.openai.requests import parse_request
from garrison_agent.runtimes.openai.tool_calls import CallParser, CallPiece
from garrison_agent.runtimes.openai.tool_calls_grammar import ToolUse


class ChatApi:
    """The handler of chat completions."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ApiError: It is refused, or failed before anything was sent.
        """
        model = self._model
        async with model.answering("chat", scope) as answer:
            request = parse_request(ChatRequest, await read_request(receive))
            use = request.tool_use
            held = await model.constraint(
                use=use,
                answer=request.wanted_schema,
                param="tools" if use is not None else "response_format",
            )
            prompt = await model.chat_prompt(
                request.turns, tools=request.template_tools, variables=request.chat_template_kwargs
            )
            options = request.options(
                request.max_completion_tokens or request.max_tokens,
                top_logprobs=request.wanted_logprobs,
                grammar=held.grammar,
                grammar_triggers=held.grammar_triggers,
            )
            answer.begin(options, prompt, copies=request.copies)
            async with model.running(answer, receive):
                if request.stream:
                    await self._stream(request, use, answer, send)
                else:
                    await self._whole(request, use, answer, send)

    async def _whole(self, request: ChatRequest, use: ToolUse | None, answer: Answer, send: Send) -> None:
        choices = [_Choice(use) for _ in range(request.copies)]
        async for part in answer.parts():
            choices[part.choice].add(part)
        if answer.finish == "cancelled":
            return
        if answer.failure is not None:
            raise api_error(answer.failure)
        shown = [
            {
                "index": index,
                "message": choice.message(),
                "finish_reason": choice.finish_reason,
                "logprobs": chat_logprobs(choice.logprobs) if request.logprobs else None,
            }
            for index, choice in enumerate(choices)
        ]
        head = {**_common(self._model.model_id, "chat.completion"), "choices": shown}
        await send_json(send, 200, {**head, "usage": answer.usage(), "timings": answer.timings()})

    async def _stream(self, request: ChatRequest, use: ToolUse | None, answer: Answer, send: Send) -> None:
        """Send server-sent events. Of plain text, everything but the text is encoded before the first token."""
        common = _common(self._model.model_id, "chat.completion.chunk")
        usage: Json = {"usage": None} if request.include_usage else {}

        def chunk(index: int, delta: Json, finish: str | None = None, **more: Any) -> Json:
            choice = {"index": index, "delta": delta, "finish_reason": finish, **more}
            return {**common, "choices": [choice], **usage}

        frames = [frame(chunk(index, {"content": TEXT})) for index in range(request.copies)]
        choices = [_StreamedChoice(use) for _ in frames]
        started = False
        async for part in answer.parts():
            index, text, finish, logprobs = part
            out = b""
            if not started:
                started = True
                await start_event_stream(send)
                for each in range(request.copies):
                    out += event(chunk(each, {"role": "assistant", "content": ""}))
            if use is not None:
                out += b"".join(event(chunk(index, delta)) for delta in choices[index].deltas(part))
                if logprobs:
                    out += event(chunk(index, {"content": ""}, logprobs=chat_logprobs(logprobs)))
            elif logprobs:
                out += event(chunk(index, {"content": text}, logprobs=chat_logprobs(logprobs)))
            elif text:
                out += framed(frames[index], text)
            if finish == "error":
                assert answer.failure is not None
                out += event(api_error(answer.failure).body()) + DONE
            elif finish in ("stop", "length"):
                out += event(chunk(index, {}, choices[index].finish_reason(finish)))
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

    def __init__(self, use: ToolUse | None) -> None:
        self.logprobs: list[TokenLogprob] = []
        self._parser = CallParser(use.schemas) if use is not None else None
        self._texts: list[str] = []
        self._calls: list[Json] = []
        self._finish: Finish | None = None

    def add(self, part: Part) -> None:
        """Take what it grew by."""
        self.logprobs += part.logprobs
        self._finish = part.finish
        if self._parser is None:
            self._texts.append(part.text)
            return
        items = self._parser.push(part.text)
        for item in items + (self._parser.finish() if part.finish is not None else []):
            if isinstance(item, str):
                self._texts.append(item)
            elif item.name is not None:
                self._calls.append({"id": call_id(), "type": "function", "function": _function(item)})
            else:
                self._calls[-1]["function"]["arguments"] += item.arguments

    def message(self) -> Json:
        """Return the assistant's message. Of a call that was cut short there is nothing in it."""
        text = "".join(self._texts)
        calls = self._calls[: self._parser.complete] if self._parser is not None else []
        message: Json = {"role": "assistant", "content": text}
        if calls:
            message.update(content=text or None, tool_calls=calls)
        return message

    @property
    def finish_reason(self) -> str:
        """Why it ended, in OpenAI's words."""
        return reason(self._finish, self._parser)


class _StreamedChoice:
    """One answer that is given in pieces."""

    def __init__(self, use: ToolUse | None) -> None:
        self._parser = CallParser(use.schemas) if use is not None else None

    def deltas(self, part: Part) -> Iterable[Json]:
        """Yield the ``delta`` of each chunk that ``part`` makes."""
        assert self._parser is not None
        items = self._parser.push(part.text)
        for item in items + (self._parser.finish() if part.finish in ("stop", "length") else []):
            if isinstance(item, str):
                yield {"content": item}
            elif item.name is not None:
                head = {"index": item.number, "id": call_id(), "type": "function", "function": _function(item)}
                yield {"tool_calls": [head]}
            else:
                yield {"tool_calls": [{"index": item.number, "function": {"arguments": item.arguments}}]}

    def finish_reason(self, finish: Finish) -> str:
        """Return why it ended, in OpenAI's words."""
        return reason(finish, self._parser)


def reason(finish: Finish | None, parser: CallParser | None) -> str:
    """Return ``finish_reason``: a complete call is what the answer stopped for."""
    if finish == "stop" and parser is not None and parser.complete:
        return "tool_calls"
    return "length" if finish == "length" else "stop"


def call_id() -> str:
    """Return a name for a call that no other has."""
    return "call_" + secrets.token_hex(12)


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> Json:
    """Return ``logprobs`` of a choice in chat completions."""
    return {"content": [shown_token(token) for token in tokens], "refusal": None}


def shown_token(token: TokenLogprob) -> Json:
    """Return a token and its alternatives as chat completions and responses show them."""
    return {
        **_shown_piece(token.piece, token.logprob),
        "top_logprobs": [_shown_piece(piece, logprob) for piece, logprob in token.top],
    }


def _shown_piece(piece: bytes, logprob: float) -> Json:
    return {"token": token_text(piece), "logprob": finite(logprob), "bytes": list(piece)}


def _function(piece: CallPiece) -> Json:
    return {"name": piece.name, "arguments": piece.arguments}


def _common(model_id: str, kind: str) -> Json:
    return {
        "id": "chatcmpl-" + secrets.token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": model_id,
    }
