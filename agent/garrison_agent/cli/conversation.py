"""A conversation with a model: what was said, how answers are made, and the file it can be kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_agent.cli.client import AgentClient
from garrison_protocol.errors import InvalidError
from garrison_protocol.manifest import ChatMessage

MAX_FILE_BYTES = 16 * 1024 * 1024
_FORMAT = "garrison-conversation/1"


@dataclass(frozen=True)
class _Parameter:
    """One number that a person may set; bounds are part of the range."""

    kind: type[int] | type[float]
    low: float
    high: float


_PARAMETERS = {
    "temperature": _Parameter(float, 0, 2),
    "top_p": _Parameter(float, 0.001, 1),
    "seed": _Parameter(int, 0, 2**32 - 1),
    "max_tokens": _Parameter(int, 1, 2**31 - 1),
}
PARAMETERS = tuple(_PARAMETERS)


def parse_parameter(name: str, text: str) -> float | int:
    """Return the value of a parameter.

    Raises:
        InvalidError: ``cli.parameter_invalid``.
    """
    known = _PARAMETERS.get(name)
    if known is None:
        raise InvalidError(
            "cli.parameter_invalid", f"there is no parameter {name!r}", hint=f"known: {', '.join(PARAMETERS)}"
        )
    try:
        value = known.kind(text)
    except ValueError:
        value = known.kind(-1)
    if not known.low <= value <= known.high:
        what = "a whole number" if known.kind is int else "a number"
        raise InvalidError(
            "cli.parameter_invalid",
            f"{name} is {what} from {known.low:g} to {known.high:g}, not {text!r}",
            hint=f"for example: {name} {max(1, known.low):g}",
        )
    return value


@dataclass
class Answer:
    """One answer, filled while it comes. ``finish`` None: not at its end."""

    text: str = ""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)

    @property
    def speed(self) -> str:
        """How fast it was, in words; empty where it was not measured."""
        parts = []
        if tokens := self.usage.get("completion_tokens"):
            parts.append(f"{tokens} tokens")
        if (rate := self.timings.get("tokens_per_s")) is not None:
            parts.append(f"{rate:.1f} tok/s")
        if (first := self.timings.get("ttft_ms")) is not None:
            parts.append(f"first token after {first / 1000:.2f} s")
        if prompt := self.usage.get("prompt_tokens"):
            cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            parts.append(f"prompt {prompt} tokens" + (f" ({cached} known already)" if cached else ""))
        return ", ".join(parts)


class _Stored(BaseModel):
    """The file of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format: str
    model: str = ""
    system: str = ""
    parameters: dict[str, float | int] = {}
    messages: list[ChatMessage] = Field(default=[], max_length=1024)


@dataclass
class Conversation:
    """The state of one ``run``. ``messages`` are user's and assistant's turns; ``schema`` binds every answer."""

    model: str
    system: str = ""
    parameters: dict[str, float | int] = field(default_factory=dict)
    schema: object = None
    messages: list[ChatMessage] = field(default_factory=list)

    def set(self, name: str, text: str) -> None:
        """Set a parameter, or with ``default`` leave it to the model again.

        Raises:
            InvalidError: ``cli.parameter_invalid``.
        """
        if text == "default" and name in _PARAMETERS:
            self.parameters.pop(name, None)
        else:
            self.parameters[name] = parse_parameter(name, text)

    def request(self, prompt: str) -> dict[str, Any]:
        """Return the body of the chat request that ``prompt`` makes."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *turns, {"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.parameters,
        }
        if self.schema is not None:
            schema = {"name": "answer", "schema": self.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def heard(self, prompt: str, answer: str) -> None:
        """Take both turns into the conversation."""
        self.messages += [ChatMessage(role="user", content=prompt), ChatMessage(role="assistant", content=answer)]

    def save(self, path: Path) -> None:
        """Write the conversation to ``path``, readable for its owner only.

        Raises:
            InvalidError: ``cli.file_unusable``.
        """
        stored = _Stored(
            format=_FORMAT,
            model=self.model,
            system=self.system,
            parameters=self.parameters,
            messages=self.messages,
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(descriptor, 0o600)
                json.dump(stored.model_dump(), file, ensure_ascii=False, indent=1)
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from error

    def load(self, path: Path) -> None:
        """Take up the conversation in ``path``; the model stays.

        Raises:
            InvalidError: ``cli.file_unusable`` or ``cli.conversation_malformed``.
        """
        stored = parse_conversation(read_file(path))
        self.system, self.parameters, self.messages = stored.system, stored.parameters, stored.messages


def parse_conversation(data: bytes) -> _Stored:
    """Return the conversation in a file's bytes.

    Raises:
        InvalidError: ``cli.conversation_malformed``.
    """
    try:
        stored = _Stored.model_validate_json(data)
        if stored.format != _FORMAT:
            raise ValueError(f"format {stored.format!r}")
        for name, value in stored.parameters.items():
            parse_parameter(name, str(value))
    except (ValueError, RecursionError, InvalidError) as error:
        what = "not its JSON" if isinstance(error, ValidationError | RecursionError) else str(error)
        raise InvalidError(
            "cli.conversation_malformed",
            f"this is no conversation that /save wrote: {what}",
            hint="name the file that /save wrote",
        ) from error
    return stored


def read_file(path: Path) -> bytes:
    """Return what is in ``path``.

    Raises:
        InvalidError: ``cli.file_unusable``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    if len(data) > MAX_FILE_BYTES:
        raise _unusable(path, f"longer than {MAX_FILE_BYTES // 2**20} MiB")
    return data


def read_schema(path: Path) -> object:
    """Return the JSON schema in ``path``; the model's worker judges it.

    Raises:
        InvalidError: ``cli.file_unusable``.
    """
    try:
        schema: object = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise _unusable(path, "it is not JSON") from error
    if not isinstance(schema, dict):
        raise _unusable(path, "a JSON schema is an object")
    return schema


def ask(client: AgentClient, request: dict[str, Any], answer: Answer, shows: Iterable[Callable[[str], object]]) -> None:
    """Send ``request`` and fill ``answer`` as it comes, giving each piece of text to ``shows``.

    Whatever ends it early (an error, Ctrl-C) also stops the model; what came until then stays in ``answer``.

    Raises:
        GarrisonError: Why there is no answer, or no whole one.
    """
    events = client.stream("/v1/chat/completions", request)
    try:
        for event in events:
            for choice in event.get("choices") or ():
                text = (choice.get("delta") or {}).get("content") or ""
                if text:
                    answer.text += text
                    for show in shows:
                        show(text)
                answer.finish = choice.get("finish_reason") or answer.finish
            answer.usage = event.get("usage") or answer.usage
            answer.timings = event.get("timings") or answer.timings
    finally:
        events.close()


def _unusable(path: Path, why: str) -> InvalidError:
    return InvalidError("cli.file_unusable", f"{path} cannot be used: {why}", hint="name another file")
