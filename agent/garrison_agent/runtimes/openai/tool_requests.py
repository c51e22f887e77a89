"""The tools that a request offers to the model, and which of them it must call. Source: OpenAI, "Function calling"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from garrison_agent.runtimes.openai.requests import Body, invalid, unsupported
from garrison_agent.runtimes.openai.tool_calls_grammar import ToolUse

MAX_TOOLS = 128
NAME_PATTERN = r"^[a-zA-Z0-9_.-]{1,64}$"


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """An item of ``tools`` in chat completions."""

    type: str
    function: Function | None = None


class _NamedFunction(Body):
    name: str


class NamedTool(Body):
    """``tool_choice`` as an object, in the words of chat completions (``function``) or of responses (``name``)."""

    type: str
    function: _NamedFunction | None = None
    name: str | None = None


ToolChoice = Literal["auto", "none", "required"] | NamedTool


def tool_use(functions: Sequence[Function], choice: ToolChoice | None, *, parallel: bool | None) -> ToolUse | None:
    """Return which tools the answer may or must call; None: it calls none.

    Raises:
        ApiError: The choice names a tool that is not there, or a kind of tool that does not exist here.
    """
    names = [function.name for function in functions]
    if len(set(names)) != len(names):
        invalid("tools", "two functions have the same name")
    named: str | None = None
    if isinstance(choice, NamedTool):
        if choice.type != "function":
            unsupported("tool_choice", "auto, none, required, or one function by its name")
        named = choice.function.name if choice.function is not None else choice.name
        if named not in names:
            invalid("tool_choice", "it names a function that is not among the tools")
    elif choice == "required" and not functions:
        invalid("tool_choice", "a call is required, but there are no tools")
    if choice == "none" or not functions:
        return None
    schemas = {
        function.name: function.parameters or {"type": "object", "properties": {}}
        for function in functions
        if named is None or function.name == named
    }
    required = named is not None or choice == "required"
    # One call, where several are not asked for: a small model that must go on does not know when to end.
    several = parallel is True if required else parallel is not False
    strict = frozenset(function.name for function in functions if function.strict)
    return ToolUse(schemas, strict, required=required, several=several and named is None)
