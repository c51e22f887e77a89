"""What a client may ask of an embedding model in OpenAI's and Ollama's words, checked.

Source: OpenAI API reference, "Embeddings"; Ollama, docs/api.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from garrison_agent.runtimes.embeddings.batching import Input
from garrison_agent.runtimes.openai.requests import Body, invalid

MAX_INPUTS = 2048

_Token = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
_Tokens = Annotated[tuple[_Token, ...], Field(min_length=1, max_length=131_072)]


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``."""

    model: str = ""
    input: (
        str
        | _Tokens
        | Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[tuple[_Tokens, ...], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, le=2**31 - 1)

    def check_supported(self) -> None:
        """Raise ``ApiError`` for an empty text, as OpenAI does."""
        if any(text == "" for text in self.inputs):
            invalid("input", "a text is empty")

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Each input, as text or as tokens."""
        given = self.input
        if isinstance(given, str):
            return (given,)
        if isinstance(given[0], int):
            return (tuple(token for token in given if isinstance(token, int)),)
        return tuple(one for one in given if not isinstance(one, int))


class OllamaEmbedRequest(Body):
    """``POST /api/embed``."""

    model: str = ""
    input: str | Annotated[tuple[str, ...], Field(max_length=MAX_INPUTS)] = ()
    truncate: bool = True
    dimensions: int | None = Field(default=None, ge=1, le=2**31 - 1)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Each input; nothing for an empty one alone, which Ollama answers with no embedding."""
        if isinstance(self.input, str):
            return (self.input,) if self.input else ()
        return self.input


class OllamaOlderRequest(Body):
    """``POST /api/embeddings``, before ``/api/embed``: one text."""

    model: str = ""
    prompt: str = ""
    truncate: bool = True
    dimensions: None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The text, if there is one."""
        return (self.prompt,) if self.prompt else ()
