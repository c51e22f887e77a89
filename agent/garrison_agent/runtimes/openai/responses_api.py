"""``POST /v1/responses``: text and function calls as items, streamed or whole. No response is kept."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from garrison_agent.runtimes.asgi import Receive, Scope, Send, send_json, start_event_stream
from garrison_agent.runtimes.llama.generation import Options
from garrison_agent.runtimes.openai.answers import Answer, Part, TextModel, read_request
from garrison_agent.runtimes.openai.api_errors import api_error
from garrison_agent.runtimes.openai.events import Json
from garrison_agent.runtimes.openai.requests import parse_request
from garrison_agent.runtimes.openai.responses_output import Event, Events, Output
from garrison_agent.runtimes.openai.responses_requests import ResponseRequest
from garrison_agent.runtimes.openai.tool_calls import CallParser
from garrison_agent.runtimes.openai.tool_calls_grammar import ToolUse


class ResponsesApi:
    """The handler of responses."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ApiError: It is refused, or failed before anything was sent.
        """
        model = self._model
        async with model.answering("chat", scope) as answer:
            request = parse_request(ResponseRequest, await read_request(receive))
            use = request.tool_use
            held = await model.constraint(
                use=use, answer=request.wanted_schema, param="tools" if use is not None else "text.format.schema"
            )
            prompt = await model.chat_prompt(request.turns, tools=request.template_tools)
            options = request.options(grammar=held.grammar, grammar_triggers=held.grammar_triggers)
            answer.begin(options, prompt)
            response = _Response(model.model_id, request, options, use, answer)
            async with model.running(answer, receive):
                if request.stream:
                    await _stream(response, answer, send)
                else:
                    await _whole(response, answer, send)


async def _whole(response: _Response, answer: Answer, send: Send) -> None:
    async for part in answer.parts():
        for _ in response.grow(part):
            pass
    if answer.finish == "cancelled":
        return
    if answer.failure is not None:
        raise api_error(answer.failure)
    for _ in response.end():
        pass
    await send_json(send, 200, response.shown())


async def _stream(response: _Response, answer: Answer, send: Send) -> None:
    events = Events()
    started = False
    async for part in answer.parts():
        out = b""
        if not started:
            started = True
            await start_event_stream(send)
            beginning = {"response": response.shown()}
            out = events.encode([("response.created", beginning), ("response.in_progress", beginning)])
        place = response.plain_place(part)
        if place is not None:
            response.output.extend(part.text)
            out += events.encode_text(part.text, place)
        else:
            out += events.encode(response.grow(part))
        if part.finish in ("stop", "length", "error"):
            out += events.encode(response.end())
            out += events.encode([(f"response.{response.status}", {"response": response.shown()})])
        if out and part.finish != "cancelled":
            await send({"type": "http.response.body", "body": out, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class _Response:
    """One response: what was asked, and what has come of it."""

    def __init__(
        self, model_id: str, request: ResponseRequest, options: Options, use: ToolUse | None, answer: Answer
    ) -> None:
        self.output = Output()
        self.status = "in_progress"
        self._answer = answer
        self._parser = CallParser(use.schemas) if use is not None else None
        self._asked: Json = {
            "id": "resp_" + secrets.token_hex(16),
            "object": "response",
            "created_at": int(time.time()),
            "model": model_id,
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": options.temperature,
            "text": {"format": _shown_format(request)},
            "tool_choice": _shown_choice(request),
            "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": options.top_p,
            "truncation": "disabled",
        }

    def plain_place(self, part: Part) -> Json | None:
        """Return where the text of ``part`` goes if that is all there is to it."""
        if self._parser is not None or part.logprobs or not part.text:
            return None
        return self.output.text_place

    def grow(self, part: Part) -> Iterator[Event]:
        """Take what the answer grew by; yield the events that tell of it."""
        if self._parser is None:
            if part.text or part.logprobs:
                yield from self.output.add_text(part.text, part.logprobs)
            return
        items = self._parser.push(part.text)
        if part.finish in ("stop", "length"):
            items += self._parser.finish()
        for item in items:
            yield from self.output.add_text(item) if isinstance(item, str) else self.output.add_call(item)

    def end(self) -> Iterator[Event]:
        """End the last item; yield the events that tell of it. An answer without any text has an empty message."""
        finish = self._answer.finish
        self.status = {"stop": "completed", "length": "incomplete"}.get(finish or "", "failed")
        if finish == "stop" and not self.output.items:
            yield from self.output.add_text("")
        yield from self.output.end_item("completed" if finish == "stop" else "incomplete")

    def shown(self) -> Json:
        """Return the response object as it is now."""
        ended = self.status != "in_progress"
        error = None
        if self.status == "failed" and self._answer.failure is not None:
            failure = api_error(self._answer.failure)
            error = {"code": failure.public_code, "message": failure.message}
        cut = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            **self._asked,
            "status": self.status,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "error": error,
            "incomplete_details": cut,
            "output": list(self.output.items),
            "usage": _usage(self._answer) if ended else None,
        }


def _usage(answer: Answer) -> Json:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _shown_format(request: ResponseRequest) -> Json:
    if request.format is None:
        return {"type": "text"}
    return request.format.model_dump(by_alias=True, exclude_none=True, exclude_defaults=False)


def _shown_choice(request: ResponseRequest) -> str | Json:
    choice = request.tool_choice
    if choice is None:
        return "auto"
    return choice if isinstance(choice, str) else choice.model_dump(exclude_none=True)
