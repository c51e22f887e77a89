"""``POST /v1/responses``: what a client may ask. Source: OpenAI API reference, "Responses".

A board keeps no conversation: what needs one (``previous_response_id``, ``store``, ``background``) is refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from garrison_agent.runtimes.llama.generation import Options
from garrison_agent.runtimes.openai.chat_requests import MAX_MESSAGES, ContentPart, called, check_parts, joined
from garrison_agent.runtimes.openai.requests import MAX_TOP_LOGPROBS, Body, Count, invalid, unsupported
from garrison_agent.runtimes.openai.tool_calls_grammar import ToolUse
from garrison_agent.runtimes.openai.tool_requests import MAX_TOOLS, NAME_PATTERN, Function, ToolChoice, tool_use

LOGPROBS = "message.output_text.logprobs"
_NOT_KEPT = "nothing is kept on a board: send the whole conversation as input"


class _Item(Body):
    """A message, a function call of an earlier answer, or what came of it."""

    type: str = Field(default="message", max_length=64)
    role: str = Field(default="", max_length=32)
    content: str | tuple[ContentPart, ...] | None = None
    call_id: str = Field(default="", max_length=256)
    name: str = Field(default="", max_length=128)
    arguments: str = ""
    output: str | tuple[ContentPart, ...] | None = None


class _Tool(Body):
    type: str = Field(max_length=64)
    name: str = Field(default="", pattern=NAME_PATTERN + "|^$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str = Field(default="", max_length=64)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class _Text(Body):
    format: _Format | None = None


class ResponseRequest(Body):
    """``POST /v1/responses``."""

    model: str = ""
    input: str | tuple[_Item, ...] = Field(max_length=None)
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    text: _Text | None = None
    tools: tuple[_Tool, ...] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    include: tuple[str, ...] | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    truncation: str | None = None

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        for name in ("previous_response_id", "conversation", "store", "background"):
            if getattr(self, name):
                unsupported(name, _NOT_KEPT)
        if self.prompt is not None:
            unsupported("prompt", "there are no stored prompts on a board; use instructions and input")
        if self.truncation not in (None, "disabled"):
            unsupported("truncation", "input is never cut; shorten it")
        if not self.input:
            invalid("input", "it is empty")
        if len(self.input) > MAX_MESSAGES and not isinstance(self.input, str):
            invalid("input", f"at most {MAX_MESSAGES} items")
        for at, item in enumerate(self.input if not isinstance(self.input, str) else ()):
            _check_item(f"input.{at}", item)
        for at, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                unsupported(f"tools.{at}.type", f"{tool.type} is not built in here; only functions of the client are")
            if not tool.name:
                invalid(f"tools.{at}.name", "it is missing")
        if self.format is not None and self.format.type == "json_schema" and self.format.schema_ is None:
            invalid("text.format.schema", "json_schema needs a schema, which is an object")
        _ = self.tool_use

    @property
    def format(self) -> _Format | None:
        """``text.format``."""
        return self.text.format if self.text is not None else None

    @property
    def wanted_schema(self) -> dict[str, Any] | bool | None:
        """The schema that the answer must meet; True: any object; None: any text."""
        if self.format is None or self.format.type == "text":
            return None
        return self.format.schema_ if self.format.type == "json_schema" else True

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives are named for each token; None: no log-probabilities are wanted."""
        return self.top_logprobs or 0 if LOGPROBS in (self.include or ()) else None

    @property
    def tool_use(self) -> ToolUse | None:
        """Which tools the answer may or must call."""
        functions = [Function(**tool.model_dump(exclude={"type"})) for tool in self.tools or ()]
        return tool_use(functions, self.tool_choice, parallel=self.parallel_tool_calls)

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        if self.tool_use is None:
            return []
        return [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools or ()
        ]

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it; calls that follow each other are one turn."""
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        for item in self.input:
            match item.type:
                case "message":
                    turns.append({"role": item.role, "content": joined(item.content)})
                case "function_call":
                    if not turns or turns[-1]["role"] != "assistant":
                        turns.append({"role": "assistant", "content": ""})
                    calls = turns[-1].setdefault("tool_calls", [])
                    calls.append(called(item.call_id, item.name, item.arguments))
                case "function_call_output":
                    turns.append({"role": "tool", "content": joined(item.output), "tool_call_id": item.call_id})
        return turns

    def options(self, **more: Any) -> Options:
        """Return the engine's options; ``more`` are those that hold the answer to a form."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p") if getattr(self, name) is not None}
        return Options(max_tokens=self.max_output_tokens, top_logprobs=self.wanted_logprobs, **given, **more)


def _check_item(where: str, item: _Item) -> None:
    match item.type:
        case "message":
            if not item.role:
                invalid(f"{where}.role", "it is missing")
            if item.content is None:
                invalid(f"{where}.content", "it is missing")
            check_parts(where, item.content)
        case "function_call":
            if not item.name or not item.call_id:
                invalid(where, "a function_call has a name and a call_id")
        case "function_call_output":
            if item.output is None or not item.call_id:
                invalid(where, "a function_call_output has an output and a call_id")
            check_parts(where, item.output)
        case "reasoning":
            pass  # clients send back all that another model answered
        case "item_reference":
            unsupported(f"{where}.type", _NOT_KEPT)
        case _:
            unsupported(f"{where}.type", f"items of the type {item.type} do not exist here")
