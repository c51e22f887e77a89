"""What a client may ask in OpenAI's words, checked, as the engine's own options: what all endpoints share.

What this engine does not do is refused by name instead of being ignored: an answer that silently lacks what was asked
for is worse than an error. Fields that change nothing on a board (``user``, ``metadata``, ``service_tier``, ...) and
those of newer clients are ignored. Source: OpenAI API reference, "Chat", "Completions".
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_agent.runtimes.llama.generation import Options
from garrison_agent.runtimes.openai.api_errors import ApiError

MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MIN_REPEAT_PENALTY = 0.01
"""Logits are divided by it: by much less, they leave the range of llama.cpp's numbers."""
_MAX_STOPS = 4
_MAX_PROMPTS = 64
_MAX_BIASED = 1024
_MAX_NAMED = 64
_FIELD = re.compile(r"[a-z_][a-z0-9_]*")
_ALTERNATIVES = frozenset({"str", "int", "bool", "float"})
_TOKEN_NUMBER = re.compile(r"[0-9]{1,9}")

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A number of tokens, as far as the engine's own integers reach."""
_Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _StreamOptions(Body):
    include_usage: bool = False


class TextRequest(Body):
    """What chat and plain completions share. Absent sampling values take llama.cpp's defaults."""

    model: str = ""
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_penalty: float | None = Field(default=None, ge=MIN_REPEAT_PENALTY, le=10)
    seed: _Seed | None = None
    stop: _Stop | Annotated[tuple[_Stop, ...], Field(max_length=_MAX_STOPS)] | None = None
    ignore_eos: bool = False
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=_MAX_BIASED)] | None = None
    grammar: Any = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def copies(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def token_bias(self) -> tuple[tuple[int, float], ...]:
        """What is added to the logits of which tokens."""
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        for token in self.logit_bias or {}:
            if not _TOKEN_NUMBER.fullmatch(token):
                invalid("logit_bias", "a key is the number of a token")
        if self.grammar is not None:
            # An ambiguous one can keep llama.cpp busy for hours within one token, where nothing can stop it.
            unsupported("grammar", "name a form with response_format, which becomes a grammar that is safe")

    def options(self, max_tokens: int | None, **more: Any) -> Options:
        """Return the engine's options; ``more`` are those that the endpoints name differently."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        given = {
            name: getattr(self, name)
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repeat_penalty",
            )
            if getattr(self, name) is not None
        }
        return Options(
            max_tokens=max_tokens,
            seed=self.seed,
            stop=stop,
            ignore_end=self.ignore_eos,
            logit_bias=self.token_bias,
            **{**given, **more},
        )


_Tokens = Annotated[tuple[Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)], ...], Field(min_length=1)]


class CompletionRequest(TextRequest):
    """``POST /v1/completions``."""

    prompt: (
        str
        | _Tokens
        | Annotated[tuple[str, ...], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Annotated[tuple[_Tokens, ...], Field(min_length=1, max_length=_MAX_PROMPTS)]
    )
    max_tokens: Count | None = 16
    logprobs: bool | int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def check_supported(self) -> None:
        """Raise ``ApiError`` for what this engine does not do."""
        super().check_supported()
        if self.suffix:
            unsupported("suffix", "nothing is inserted before a given end")
        if self.best_of not in (None, self.copies):
            unsupported("best_of", "all answers that are made are returned; set n alone")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            invalid("logprobs", f"0 to {MAX_TOP_LOGPROBS}")
        if self.echo and self.top_logprobs is not None:
            unsupported("echo", "with logprobs: only those of the answer are known")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompts):
            unsupported("echo", "only with a prompt of text")

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Each prompt, as text or as tokens."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return (prompt,)
        if isinstance(prompt[0], int):
            return (prompt,)  # the union allows numbers in a list of their own only
        return prompt

    @property
    def top_logprobs(self) -> int | None:
        """How many alternatives are named for each token; None: no log-probabilities are wanted."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)


class ScoreRequest(Body):
    """``POST /internal/score``: how likely the model finds each choice after the prompt."""

    prompt: str
    choices: tuple[str, ...] = Field(min_length=1, max_length=16)


class NamedSchema(Body):
    """A JSON schema with a name, as ``response_format`` and ``text.format`` hold one."""

    name: str = Field(default="", max_length=_MAX_NAMED)
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """``response_format``. llama.cpp's form, ``json_object`` with a ``schema``, is understood too."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def wanted(self) -> dict[str, Any] | bool | None:
        """Return the schema that the answer must meet; True: any object; None: any text.

        Raises:
            ApiError: The schema is missing.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return True if self.schema_ is None else self.schema_
        if self.json_schema is None or not isinstance(self.json_schema.schema_, dict):
            invalid("response_format.json_schema.schema", "json_schema needs a schema, which is an object")
        return self.json_schema.schema_


R = TypeVar("R", bound=Body)


def parse_request(model: type[R], body: bytes) -> R:
    """Return the request in ``body``.

    Raises:
        ApiError: 400, naming the field that is wrong.
    """
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, "inference.invalid_json", f"the body is not JSON: {first['msg']}") from error
        param = ".".join(_field_names(first["loc"])) or None
        raise ApiError(400, "inference.invalid_value", f"{param or 'body'}: {first['msg']}", param=param) from error
    check = getattr(request, "check_supported", None)
    if check is not None:
        check()
    return request


def _field_names(location: tuple[int | str, ...]) -> list[str]:
    """Return the part of a validation error's location that names fields, not the alternatives of a union."""
    names = []
    for part in location:
        if isinstance(part, str) and (part in _ALTERNATIVES or not _FIELD.fullmatch(part)):
            break
        names.append(str(part))
    return names


def unsupported(param: str, instead: str) -> NoReturn:
    """Refuse a parameter that this engine does not have.

    Raises:
        ApiError: Always.
    """
    raise ApiError(400, "inference.unsupported_parameter", f"{param} is not supported here: {instead}", param=param)


def invalid(param: str, reason: str) -> NoReturn:
    """Refuse a value.

    Raises:
        ApiError: Always.
    """
    raise ApiError(400, "inference.invalid_value", f"{param}: {reason}", param=param)
