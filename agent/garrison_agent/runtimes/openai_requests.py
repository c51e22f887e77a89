"""What a client may ask in OpenAI's words, checked, as the engine's own options.

What this engine does not do is refused by name instead of being ignored: an answer that silently lacks what was asked
for is worse than an error. Source: OpenAI API reference, "Chat", "Completions".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_agent.runtimes.batching import Options

_MAX_STOPS = 4


class ApiError(Exception):
    """An error in OpenAI's form. ``code`` is ours, dotted, for records; clients see its last part."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the JSON answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        code = self.code.rpartition(".")[2]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _ChatTurn(_Body):
    role: str = Field(max_length=32)
    content: str | tuple[_TextPart, ...]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _StreamOptions(_Body):
    include_usage: bool = False


class _ResponseFormat(_Body):
    type: str


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class TextRequest(_Body):
    """What chat and plain completions share. Absent sampling values take llama.cpp's defaults."""

    model: str = ""
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = None
    stop: _Stop | Annotated[tuple[_Stop, ...], Field(max_length=_MAX_STOPS)] | None = None
    ignore_eos: bool = False
    n: int | None = None
    logprobs: bool | int | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        if self.n not in (None, 1):
            _unsupported("n", "one answer per request")
        if self.logprobs:
            _unsupported("logprobs", "no log-probabilities in answers")
        if self.logit_bias:
            _unsupported("logit_bias", "no logit bias")

    def options(self, max_tokens: int | None) -> Options:
        """Return the engine's options."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        given = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
            if getattr(self, name) is not None
        }
        return Options(max_tokens=max_tokens, seed=self.seed, stop=stop, ignore_end=self.ignore_eos, **given)


class ChatRequest(TextRequest):
    """``POST /v1/chat/completions``."""

    messages: tuple[_ChatTurn, ...] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: tuple[Any, ...] | None = None
    functions: tuple[Any, ...] | None = None
    response_format: _ResponseFormat | None = None

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        super().check_supported()
        if self.tools or self.functions:
            _unsupported("tools", "no tool calls")
        if self.response_format is not None and self.response_format.type != "text":
            _unsupported("response_format", "plain text only")

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as chat templates take it."""
        return [{"role": turn.role, "content": turn.text} for turn in self.messages]


class CompletionRequest(TextRequest):
    """``POST /v1/completions``."""

    prompt: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(default=16, ge=1)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        super().check_supported()
        if self.echo:
            _unsupported("echo", "the prompt is not repeated")
        if self.suffix:
            _unsupported("suffix", "no insertion")
        if self.best_of not in (None, 1):
            _unsupported("best_of", "one answer per request")

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class ScoreRequest(_Body):
    """``POST /internal/score``: how likely the model finds each choice after the prompt."""

    prompt: str
    choices: tuple[str, ...] = Field(min_length=1, max_length=16)


R = TypeVar("R", bound=_Body)


def parse_request(model: type[R], body: bytes) -> R:
    """Return the request in ``body``.

    Raises:
        ApiError: 400, naming the field that is wrong.
    """
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, "inference.invalid_json", f"the body is not JSON: {first['msg']}") from error
        param = ".".join(str(part) for part in first["loc"]) or None
        raise ApiError(400, "inference.invalid_value", f"{param or 'body'}: {first['msg']}", param=param) from error
    if isinstance(request, TextRequest):
        request.check_supported()
    return request


def _unsupported(param: str, instead: str) -> NoReturn:
    raise ApiError(400, "inference.unsupported_parameter", f"{param} is not supported here: {instead}", param=param)
