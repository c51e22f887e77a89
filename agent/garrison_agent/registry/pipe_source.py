"""A ``MetadataSource`` whose other end is the parent process: how the verifier reads what only the agent can reach.

The child writes one JSON line for each question. The parent answers with one JSON line that says either how many bytes
follow, or what went wrong.
"""

from __future__ import annotations

from typing import IO

from pydantic import BaseModel, ValidationError

from garrison_agent.registry.source import MetadataSource
from garrison_protocol import errors
from garrison_protocol.errors import GarrisonError, RefusedError, UnavailableError

MAX_LINE_BYTES = 64 * 1024 * 1024
"""The last line holds the view with its manifests in base64."""


class Failure(BaseModel):
    """A ``GarrisonError`` on its way from one process to the other."""

    kind: str
    code: str
    message: str
    hint: str
    retryable: bool
    fields: dict[str, str | int | float | None]

    @classmethod
    def of(cls, error: GarrisonError) -> Failure:
        """Return ``error`` as a message."""
        return cls(
            kind=type(error).__name__,
            code=error.code,
            message=error.message,
            hint=error.hint,
            retryable=error.retryable,
            fields=error.fields,
        )

    def error(self) -> GarrisonError:
        """Return the error as it was."""
        kind = getattr(errors, self.kind, GarrisonError)
        if not (isinstance(kind, type) and issubclass(kind, GarrisonError)):
            kind = GarrisonError
        return kind(self.code, self.message, hint=self.hint, retryable=self.retryable, **self.fields)


class Question(BaseModel):
    """What the child asks for: metadata by its name, or with ``sha256`` a target by its path."""

    name: str
    sha256: str | None = None
    max_bytes: int


class Line(BaseModel):
    """What the child writes: a question, or by the verifier its last word."""

    question: Question | None = None


class _Reply(BaseModel):
    size: int = 0
    failure: Failure | None = None


class PipeSource:
    """The child's end. One thread at a time."""

    def __init__(self, questions: IO[bytes], answers: IO[bytes]) -> None:
        self._questions, self._answers = questions, answers

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.metadata``."""
        return self._ask(Question(name=name, max_bytes=max_bytes))

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.target``."""
        return self._ask(Question(name=path, sha256=sha256, max_bytes=max_bytes))

    def _ask(self, question: Question) -> bytes:
        self._questions.write(Line(question=question).model_dump_json().encode() + b"\n")
        self._questions.flush()
        try:
            reply = _Reply.model_validate_json(self._answers.readline(MAX_LINE_BYTES))
        except ValidationError as error:
            raise _gone() from error
        if reply.failure is not None:
            raise reply.failure.error()
        if reply.size > question.max_bytes:
            raise RefusedError("source.too_long", f"{question.name}: more than the {question.max_bytes} bytes allowed")
        data = self._answers.read(reply.size)
        if len(data) != reply.size:
            raise _gone()
        return data


def answer(question: Question, source: MetadataSource, answers: IO[bytes]) -> None:
    """Ask ``source`` in this process, and write what it says for the child.

    Raises:
        OSError: The child has gone.
    """
    data = b""
    try:
        if question.sha256 is None:
            data = source.metadata(question.name, question.max_bytes)
        else:
            data = source.target(question.name, question.sha256, question.max_bytes)
        reply = _Reply(size=len(data))
    except GarrisonError as error:
        reply = _Reply(failure=Failure.of(error))
    answers.write(reply.model_dump_json().encode() + b"\n" + data)
    answers.flush()


def _gone() -> UnavailableError:
    return UnavailableError("source.unreachable", "the agent that started this check has gone", retryable=True)
