"""The event loop's side of text generation: what each API of a text worker builds on.

A request becomes an ``Answer``: one generation, or several of one or more prompts. ``TextModel.answering`` counts and
records it, whatever becomes of it; ``TextModel.running`` hands it to the decode thread and stops it when its client
leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from garrison_agent.runtimes.asgi import BodyTooLargeError, Receive, Scope, on_disconnect, read_body
from garrison_agent.runtimes.llama.decode_thread import DecodeThread
from garrison_agent.runtimes.llama.generation import Delta, Finish, Generation, Options, TokenLogprob
from garrison_agent.runtimes.openai.api_errors import ApiError, api_error
from garrison_agent.runtimes.openai.chat_template import ChatTemplate
from garrison_agent.runtimes.openai.tool_calls_grammar import CallForm, Constraint, ToolUse, call_form, constraint
from garrison_agent.runtimes.openai.tool_calls_prompt import with_tools_in_words
from garrison_agent.runtimes.status import MAX_APP, RequestKind, RequestRecord
from garrison_protocol.errors import GarrisonError, InvalidError

INTERNAL = "/internal"
"""Paths under it are the agent's own (the gate): the same answers, but no records. They are never forwarded."""

_APP_HEADER = b"x-garrison-app"
_TIMEOUT_HEADER = b"x-garrison-timeout-ms"
_DISCONNECTED = "inference.client_disconnected"
_CLIENT_LEFT = 499
"""The status in records when the client went away first (nginx's number; it never reaches anybody)."""

Prompt = str | tuple[int, ...]


class Part(NamedTuple):
    """What one generation of an answer grew by, several tokens together when they came together."""

    choice: int
    text: str
    finish: Finish | None
    logprobs: tuple[TokenLogprob, ...]


class Answer:
    """One request and its generations. ``finish`` stays None until all have ended.

    ``began`` is when it arrived; ``app`` is whose it is.
    """

    def __init__(self, scope: Scope) -> None:
        self.began = time.monotonic()
        self.finish: Finish | None = None
        self.generations: tuple[Generation, ...] = ()
        self.app = ""
        self._scope = scope
        self._copies = 1
        self._deltas: list[tuple[int, Delta]] = []
        self._news = asyncio.Event()

    def begin(self, options: Options, *prompts: Prompt, copies: int = 1) -> None:
        """Make the generations that the decode thread will run: ``copies`` of each prompt, in the prompts' order.

        With a seed, each copy gets its own, so that they differ and can all be repeated.

        Raises:
            ApiError: The request's deadline is no number of milliseconds.
        """
        self.app, deadline_s = request_terms(self._scope, self.began)
        self._copies = copies
        made: list[Generation] = []
        for prompt in prompts:
            for copy in range(copies):
                own = options
                if copy and options.seed is not None:
                    own = dataclasses.replace(options, seed=options.seed + copy)
                hear = partial(self._hear, len(made))
                made.append(Generation(prompt, own, hear, app=self.app, deadline_s=deadline_s))
        self.generations = tuple(made)

    def cancel(self) -> None:
        """Stop every generation before its next token; nobody reads on."""
        if self.generations and self.finish is None:
            for generation in self.generations:
                generation.cancel()
            self._hear(0, Delta("", "cancelled"))

    def _hear(self, index: int, delta: Delta) -> None:
        self._deltas.append((index, delta))
        self._news.set()

    async def parts(self) -> AsyncIterator[Part]:
        """Yield the answer as it grows; the first part comes once every generation was accepted.

        After a part with the finish ``error`` or ``cancelled`` there is no other; an error stops all generations.

        Raises:
            ApiError: The request was refused before it began. A later failure is the finish ``error``.
        """
        refused_or_accepted: set[int] = set()
        accepted = False
        running = len(self.generations)
        early: list[tuple[int, Delta]] = []
        while running:
            await self._news.wait()
            self._news.clear()
            deltas, self._deltas = self._deltas, []
            if not accepted:
                early += deltas
                refused_or_accepted.update(index for index, _ in deltas)
                self._raise_refusal(early)
                cancelled = any(delta.finish == "cancelled" for _, delta in deltas)
                if len(refused_or_accepted) < len(self.generations) and not cancelled:
                    continue
                accepted, deltas, early = True, early, []
            for part in _merged(deltas) if len(self.generations) > 1 else (_joined(0, deltas),):
                if part.finish is None:
                    yield part
                    continue
                running -= 1
                if part.finish in ("error", "cancelled"):
                    running = 0
                    self.cancel()
                    self.finish = part.finish
                elif not running:
                    self.finish = "length" if part.finish == "length" else "stop"
                yield part
                if part.finish in ("error", "cancelled"):
                    return

    def _raise_refusal(self, deltas: Sequence[tuple[int, Delta]]) -> None:
        """Raise the first refusal: a generation whose first word is that it failed."""
        known: set[int] = set()
        for index, delta in deltas:
            error = self.generations[index].error
            if delta.finish == "error" and index not in known and error is not None:
                self.cancel()
                self.finish = "error"
                raise api_error(error)
            known.add(index)

    @property
    def failure(self) -> GarrisonError | None:
        """Why a generation failed, if one did."""
        return next((one.error for one in self.generations if one.error is not None), None)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once however many copies were answered."""
        return sum(generation.prompt_tokens for generation in self.generations[:: self._copies])

    @property
    def cached_tokens(self) -> int:
        """How many of those were not read again."""
        return sum(generation.cached_tokens for generation in self.generations[:: self._copies])

    @property
    def completion_tokens(self) -> int:
        """Tokens of all generations."""
        return sum(generation.completion_tokens for generation in self.generations)

    @property
    def first_token_at(self) -> float | None:
        """When the first token of any generation was there (monotonic seconds)."""
        return min((one.first_token_at for one in self.generations if one.first_token_at is not None), default=None)

    @property
    def last_token_at(self) -> float | None:
        """When the latest token of any generation was there (monotonic seconds)."""
        return max((one.last_token_at for one in self.generations if one.last_token_at is not None), default=None)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's ``usage`` object."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def timings(self) -> dict[str, float | None]:
        """Return the measured times: ``ttft_ms`` from the request's arrival, ``tokens_per_s`` after the first token."""
        first, last = self.first_token_at, self.last_token_at
        if first is None or last is None:
            return {"ttft_ms": None, "tokens_per_s": None}
        after_first = self.completion_tokens - 1
        rate = round(after_first / (last - first), 3) if after_first > 0 and last > first else 0
        return {"ttft_ms": round((first - self.began) * 1000, 3), "tokens_per_s": rate or None}

    def to_record(self, kind: RequestKind, error: ApiError | None) -> RequestRecord:
        """Return what happened, once the answer ended, was refused with ``error``, or was left by its client."""
        if error is None and self.failure is not None:
            error = api_error(self.failure)
        left = error is None and self.finish not in ("stop", "length")
        timings = self.timings()
        return RequestRecord(
            kind,
            ok=error is None,
            error_code=_DISCONNECTED if left else None if error is None else error.code,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            ttft_ms=timings["ttft_ms"],
            duration_ms=round((time.monotonic() - self.began) * 1000, 3),
            tokens_per_s=timings["tokens_per_s"],
            status=_CLIENT_LEFT if left else 200 if error is None else error.status,
            app=self.app,
        )


def _joined(index: int, deltas: Sequence[tuple[int, Delta]]) -> Part:
    """Return what the deltas of one generation add together."""
    if len(deltas) == 1:
        return Part(index, *deltas[0][1])
    finish = next((delta.finish for _, delta in deltas if delta.finish is not None), None)
    logprobs = tuple(one for _, delta in deltas for one in delta.logprobs)
    return Part(index, "".join(delta.text for _, delta in deltas), finish, logprobs)


def _merged(deltas: Sequence[tuple[int, Delta]]) -> list[Part]:
    """Return one part for each generation among ``deltas``."""
    by_index: dict[int, list[tuple[int, Delta]]] = {}
    for index, delta in deltas:
        by_index.setdefault(index, []).append((index, delta))
    return [_joined(index, own) for index, own in by_index.items()]


class TextModel:
    """A loaded text model as its APIs see it, and the counts of what it did."""

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
        self.model_id = model_id
        self.decode = decode
        self.template = template
        self._begin_text = begin_text
        self._record = record
        self._done = 0
        self._tokens = 0

    @property
    def context_length(self) -> int:
        """Tokens that one request may fill."""
        return self.decode.context_length

    def health(self) -> dict[str, Any]:
        """Return the model's name and counts."""
        return {
            "status": "ok",
            "model": self.model_id,
            "active": self.decode.active,
            "queued": self.decode.queued,
            "requests": self._done,
            "completion_tokens": self._tokens,
            "steps": self.decode.steps,
        }

    @property
    def call_form(self) -> CallForm:
        """How tool calls look in this model's answers."""
        return call_form(self.template.source if self.template is not None else "")

    async def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text that asks for the assistant's next turn.

        ``messages``: each with ``role``, ``content`` (text), and if it has them ``tool_calls`` (with arguments as
        objects), ``tool_call_id``. ``tools``: as OpenAI's requests list them. ``variables`` are what a template knows
        besides, such as ``enable_thinking``.

        Raises:
            ApiError: There is no template, or it does not take these messages.
        """
        if self.template is None:
            raise ApiError(
                400, "inference.no_chat_template", f"{self.model_id} has no chat template; use /v1/completions"
            )
        if not self.template.takes_tools:
            messages, tools = with_tools_in_words(messages, tools), ()
        try:
            prompt = await self.template.render(messages, tools=tools, variables=variables)
        except GarrisonError as error:
            raise api_error(error, param="messages") from error
        return prompt.removeprefix(self._begin_text) if self._begin_text else prompt

    async def constraint(
        self,
        *,
        use: ToolUse | None = None,
        answer: Mapping[str, Any] | bool | None = None,
        param: str,
    ) -> Constraint:
        """Return what holds an answer to tools or to a schema (True: any object); ``param`` names the field.

        Raises:
            ApiError: There is no such grammar.
        """
        if use is None and answer is None:
            return Constraint()
        try:
            # A thread of its own: large schemas take a while.
            return await asyncio.to_thread(constraint, use, self.call_form, answer)
        except InvalidError as error:
            raise api_error(
                error, param=".".join(filter(None, (param, str(error.fields.get("param") or ""))))
            ) from error

    @contextlib.asynccontextmanager
    async def answering(self, kind: RequestKind, scope: Scope) -> AsyncIterator[Answer]:
        """Yield the answer to one request; count and record it at the end of the block."""
        answer = Answer(scope)
        error: ApiError | None = None
        try:
            yield answer
        except ApiError as caught:
            error = caught
            raise
        finally:
            self._done += 1
            answer.cancel()
            self._tokens += answer.completion_tokens
            if not scope["path"].startswith(INTERNAL + "/"):
                self._record(answer.to_record(kind, error))

    @contextlib.asynccontextmanager
    async def running(self, answer: Answer, receive: Receive) -> AsyncIterator[None]:
        """Run the answer's generations within the block. The request's body must have been read."""
        async with on_disconnect(receive, answer.cancel):
            for generation in answer.generations:
                self.decode.submit(generation)
            yield


def request_terms(scope: Scope, began: float) -> tuple[str, float | None]:
    """Return whose request this is, and until when (monotonic, as ``began``) it must be answered.

    Raises:
        ApiError: The deadline is no number of milliseconds.
    """
    app, deadline_s = "", None
    for name, value in scope.get("headers", ()):
        if name == _APP_HEADER:
            app = value[:MAX_APP].decode("latin-1")
        elif name == _TIMEOUT_HEADER:
            if not value.isdigit() or len(value) > 12:
                raise ApiError(
                    400, "inference.invalid_value", "the deadline is not in milliseconds", param=name.decode()
                )
            deadline_s = began + int(value) / 1000
    return app, deadline_s


async def read_request(receive: Receive) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 413: it is too long.
        ClientGoneError: The client went away in the middle of it.
    """
    try:
        return await read_body(receive)
    except BodyTooLargeError:
        raise ApiError(413, "inference.body_too_large", "the request is longer than 16 MiB") from None
