"""What a client may ask in Ollama's words, checked, as the engine's own options.

Defaults are Ollama's. What only says how a model is loaded (``num_gpu``, ``num_thread``, ``use_mmap``, ...) is ignored:
the board decides that. What would change the answer and is not there is refused by name. Source: Ollama, docs/api.md,
docs/modelfile.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from garrison_agent.runtimes.llama.generation import REPEAT_WINDOW, Options
from garrison_agent.runtimes.openai.requests import MAX_TOP_LOGPROBS, MIN_REPEAT_PENALTY, Body, invalid, unsupported
from garrison_agent.runtimes.openai.tool_calls_grammar import Constraint, ToolUse
from garrison_agent.runtimes.openai.tool_requests import MAX_TOOLS, Tool, tool_use

MAX_MESSAGES = 1024
_MAX_STOPS = 16
_INT32 = 2**31 - 1
_REPEAT_PENALTY = 1.1

_Stop = Annotated[str, Field(max_length=256)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Flag = Annotated[bool, BeforeValidator(lambda value: True if value is None else value)]
"""True, unless it is false."""


class OllamaOptions(Body):
    """``options``: how the answer is sampled."""

    num_ctx: int | None = Field(default=None, ge=1)
    num_predict: int | None = Field(default=None, le=_INT32)
    temperature: _Number | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=-1, le=_INT32)
    top_p: _Number | None = Field(default=None, ge=0, le=1)
    min_p: _Number | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: _Stop | Annotated[tuple[_Stop, ...], Field(max_length=_MAX_STOPS)] | None = None
    repeat_penalty: _Number | None = Field(default=None, ge=0, le=10)
    repeat_last_n: int | None = None
    presence_penalty: _Number | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: _Number | None = Field(default=None, ge=-2, le=2)
    typical_p: _Number | None = None
    tfs_z: _Number | None = None
    mirostat: int | None = None

    def check_supported(self, context_length: int) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        if self.num_ctx is not None and self.num_ctx > context_length:
            invalid("options.num_ctx", f"this model's context holds {context_length} tokens here, not {self.num_ctx}")
        if self.repeat_penalty and self.repeat_penalty < MIN_REPEAT_PENALTY:
            invalid("options.repeat_penalty", f"0 for none, or at least {MIN_REPEAT_PENALTY}")
        for name, neutral in (("typical_p", 1.0), ("tfs_z", 1.0), ("mirostat", 0)):
            if getattr(self, name) not in (None, neutral):
                unsupported(f"options.{name}", "temperature, top_k, top_p, and min_p sample")
        if self._penalised and self.repeat_last_n not in (None, 0, REPEAT_WINDOW):
            unsupported("options.repeat_last_n", f"the penalty looks at the last {REPEAT_WINDOW} tokens, or 0 for none")

    @property
    def _penalised(self) -> bool:
        return self.repeat_penalty not in (0, 1)

    @property
    def _stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(stop for stop in stops if stop)

    def to_options(self, **more: Any) -> Options:
        """Return the engine's options; ``more`` are those that stand elsewhere in the request."""
        penalty = _REPEAT_PENALTY if self.repeat_penalty is None else self.repeat_penalty
        return Options(
            max_tokens=self.num_predict if self.num_predict is not None and self.num_predict > 0 else None,
            temperature=0.8 if self.temperature is None else self.temperature,
            top_p=0.9 if self.top_p is None else self.top_p,
            top_k=40 if self.top_k is None else max(self.top_k, 0),
            min_p=0.0 if self.min_p is None else self.min_p,
            seed=None if self.seed is None or self.seed < 0 else self.seed,
            stop=self._stops,
            repeat_penalty=1.0 if self.repeat_last_n == 0 or not self._penalised else penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            **more,
        )


class OllamaRequest(Body):
    """What ``/api/chat`` and ``/api/generate`` share. ``keep_alive`` is the agent's business."""

    model: str = Field(max_length=512)
    stream: _Flag = True
    options: OllamaOptions | None = None
    format: dict[str, Any] | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        if self.think:
            unsupported("think", f"{self.model} does not support thinking")
        if isinstance(self.format, str) and self.format not in ("", "json"):
            invalid("format", 'expected "json", "", or a JSON schema')

    @property
    def wanted_schema(self) -> dict[str, Any] | bool | None:
        """The schema that the answer must meet; True: any object; None: any text."""
        if isinstance(self.format, dict):
            return self.format
        return True if self.format else None

    def to_options(self, context_length: int, held_to: Constraint) -> Options:
        """Return the engine's options; ``held_to`` is what the answer must look like.

        Raises:
            ApiError: Something in them is not possible here.
        """
        options = self.options or OllamaOptions()
        options.check_supported(context_length)
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        return options.to_options(
            grammar=held_to.grammar, grammar_triggers=held_to.grammar_triggers, top_logprobs=wanted
        )


class _Called(Body):
    name: str = Field(max_length=128)
    arguments: dict[str, Any] = Field(default_factory=dict)


class _Call(Body):
    function: _Called


class _Message(Body):
    role: str = Field(max_length=32)
    content: str | None = None
    images: tuple[Any, ...] | None = None
    tool_calls: tuple[_Call, ...] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_name: str | None = Field(default=None, max_length=128)

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_name is not None:
            turn["name"] = self.tool_name
        if self.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": call.function.name, "arguments": call.function.arguments}}
                for call in self.tool_calls
            ]
        return turn


class ChatRequest(OllamaRequest):
    """``POST /api/chat``."""

    messages: tuple[_Message, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: tuple[Tool, ...] | None = Field(default=None, max_length=MAX_TOOLS)

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        super().check_supported()
        for at, message in enumerate(self.messages):
            _refuse_images(f"messages.{at}.images", message.images)
        for at, tool in enumerate(self.tools or ()):
            if tool.type != "function" or tool.function is None:
                unsupported(f"tools.{at}", "tools of the type function only")

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        return [message.for_template() for message in self.messages]

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def tool_use(self) -> ToolUse | None:
        """Which tools the answer may call: with Ollama it is always the model's choice."""
        functions = [tool.function for tool in self.tools or () if tool.function is not None]
        return tool_use(functions, None, parallel=None)


class GenerateRequest(OllamaRequest):
    """``POST /api/generate``."""

    prompt: str = Field(min_length=1)
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    context: tuple[Annotated[int, Field(ge=0, le=_INT32)], ...] | None = None
    images: tuple[Any, ...] | None = None

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        super().check_supported()
        _refuse_images("images", self.images)
        if self.template:
            unsupported("template", "the model's own is used; with raw, the prompt is taken as it is")
        if self.suffix:
            unsupported("suffix", "nothing is inserted before a given end")
        if self.raw and (self.system or self.context):
            unsupported("raw", "neither with system nor with context")

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The prompt as a conversation, as chat templates take it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


def _refuse_images(where: str, images: Sequence[Any] | None) -> None:
    if images:
        unsupported(where, "this model takes text")
