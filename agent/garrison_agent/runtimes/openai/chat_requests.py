"""``POST /v1/chat/completions``: what a client may ask. Source: OpenAI API reference, "Chat"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from garrison_agent.runtimes.openai.requests import (
    MAX_TOP_LOGPROBS,
    Body,
    Count,
    ResponseFormat,
    TextRequest,
    invalid,
    unsupported,
)
from garrison_agent.runtimes.openai.tool_calls_grammar import ToolUse
from garrison_agent.runtimes.openai.tool_requests import MAX_TOOLS, Tool, ToolChoice, tool_use

MAX_MESSAGES = 1024


class _Part(Body):
    type: str = Field(max_length=32)
    text: str | None = None
    refusal: str | None = None


class _Called(Body):
    name: str = Field(max_length=128)
    arguments: str = ""


class _Call(Body):
    id: str = Field(default="", max_length=256)
    function: _Called


class _Turn(Body):
    role: str = Field(max_length=32)
    content: str | tuple[_Part, ...] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: tuple[_Call, ...] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, max_length=256)

    def for_template(self) -> dict[str, Any]:
        """Return the turn as chat templates take it: text in one piece, arguments as an object."""
        turn: dict[str, Any] = {"role": self.role, "content": joined(self.content)}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            turn["tool_calls"] = [
                called(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ]
        return turn


class ChatRequest(TextRequest):
    """``POST /v1/chat/completions``."""

    messages: tuple[_Turn, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: tuple[Tool, ...] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: tuple[Any, ...] | None = None
    function_call: Any = None
    modalities: tuple[str, ...] | None = None
    audio: Any = None
    web_search_options: Any = None
    prediction: Any = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = Field(default=None, max_length=32)

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        super().check_supported()
        if self.functions or self.function_call is not None:
            unsupported("functions", "use tools and tool_choice, which took their place")
        if self.audio is not None or set(self.modalities or ()) - {"text"}:
            unsupported("modalities", "text only")
        if self.web_search_options is not None:
            unsupported("web_search_options", "this board searches nothing")
        if self.top_logprobs is not None and not self.logprobs:
            invalid("top_logprobs", "set logprobs to true as well")
        for at, turn in enumerate(self.messages):
            self._check_turn(f"messages.{at}", turn)
        for at, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                unsupported(f"tools.{at}.type", "tools of the type function only")
            if tool.function is None:
                invalid(f"tools.{at}.function", "it is missing")
        _ = self.wanted_schema, self.tool_use  # both refuse what cannot be, before anything else is done

    def _check_turn(self, where: str, turn: _Turn) -> None:
        if turn.content is None and not turn.tool_calls:
            invalid(f"{where}.content", "it is missing")
        check_parts(where, turn.content)

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        return [turn.for_template() for turn in self.messages]

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them: as they were sent."""
        if self.tool_use is None:
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def tool_use(self) -> ToolUse | None:
        """Which tools the answer may or must call."""
        functions = [tool.function for tool in self.tools or () if tool.function is not None]
        return tool_use(functions, self.tool_choice, parallel=self.parallel_tool_calls)

    @property
    def wanted_schema(self) -> dict[str, Any] | bool | None:
        """The schema that the answer must meet; True: any object; None: any text."""
        return None if self.response_format is None else self.response_format.wanted()

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives are named for each token; None: no log-probabilities are wanted."""
        return self.top_logprobs or 0 if self.logprobs else None


def check_parts(where: str, content: str | Sequence[_Part] | None) -> None:
    """Refuse content that is no text.

    Raises:
        ApiError: It names the first such part.
    """
    if content is None or isinstance(content, str):
        return
    for at, part in enumerate(content):
        if part.type not in _TEXT_PARTS:
            invalid(f"{where}.content.{at}", f"parts of the type {part.type} are not supported: this model takes text")
        if part.text is None and part.refusal is None:
            invalid(f"{where}.content.{at}.text", "it is missing")


def joined(content: str | Sequence[_Part] | None) -> str:
    """Return content as one text."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal or "" for part in content)


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call as chat templates take it. Arguments that are no JSON object stay the text they are."""
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        value = arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": value}}


_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
ContentPart = _Part
