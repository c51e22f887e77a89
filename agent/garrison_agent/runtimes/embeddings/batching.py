"""Embeddings of many inputs in few decode calls, over any backend. Not thread-safe; one thread owns it.

Each step fills one batch with whole inputs of the waiting requests in turn, so that a request with one input does not
wait for another with a thousand. A request joins, and leaves when it is cancelled or late, between two steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from garrison_protocol.errors import GarrisonError, InvalidError, UnavailableError

MAX_WAITING = 64

Vector = npt.NDArray[np.float32]
Input = str | tuple[int, ...]


class EmbeddingError(Exception):
    """The backend could not embed a batch."""


class EmbeddingBackend(Protocol):
    """A loaded model. An input has at most ``context_length`` tokens, a batch at most ``parallel`` inputs.

    More than one input share a batch of ``batch_size`` tokens only.
    """

    context_length: int
    batch_size: int
    parallel: int
    vocabulary: int

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``, with what the model puts before and after it."""

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """Return the first ``context_length`` tokens, with the model's own ending, if it has one, kept."""

    def embed(self, inputs: Sequence[Sequence[int]], go_on: Callable[[], bool]) -> list[Vector] | None:
        """Return the pooled vector of each input, not normalised; None if ``go_on``, asked now and then, said no.

        Raises ``EmbeddingError``.
        """


@dataclass(eq=False)
class Embedding:
    """One request. Its owner sets ``cancelled``; ``on_done`` is called once, in the batching thread.

    ``truncate``: an input beyond the context is cut instead of refused. ``deadline_s`` is monotonic.
    """

    inputs: tuple[Input, ...]
    on_done: Callable[[list[Vector] | GarrisonError], None]
    truncate: bool = False
    deadline_s: float | None = None
    cancelled: bool = False
    prompt_tokens: int = 0


@dataclass(eq=False)
class _Job:
    request: Embedding
    tokens: list[list[int]]
    vectors: list[Vector] = field(default_factory=list)
    taken: int = 0
    """Inputs that are in a batch or done."""


class EmbeddingBatcher:
    """The requests of one model."""

    def __init__(self, backend: EmbeddingBackend, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._jobs: deque[_Job] = deque()
        self.steps = 0
        """Decode calls so far: progress, for whoever watches."""

    @property
    def busy(self) -> bool:
        """Tell whether ``step`` has something to do."""
        return bool(self._jobs)

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._jobs)

    def add(self, request: Embedding) -> None:
        """Accept a request, or answer it with an error."""
        try:
            if len(self._jobs) >= MAX_WAITING:
                raise UnavailableError(
                    "inference.queue_full",
                    f"{len(self._jobs)} requests wait already",
                    hint="send the request again later",
                    retryable=True,
                )
            tokens = [self._tokens(request, index) for index in range(len(request.inputs))]
        except GarrisonError as error:
            request.on_done(error)
            return
        request.prompt_tokens = sum(map(len, tokens))
        self._jobs.append(_Job(request, tokens))

    def step(self) -> None:
        """Do one decode call's worth of work."""
        self._drop()
        chosen = self._plan()
        if not chosen:
            return
        jobs = list(dict.fromkeys(job for job, _ in chosen))

        def go_on() -> bool:
            self.steps += 1
            return any(self._why_over(job) is None for job in jobs)

        try:
            vectors = self._backend.embed([tokens for _, tokens in chosen], go_on)
        except EmbeddingError as error:
            failure = UnavailableError("inference.decode_failed", str(error), retryable=True)
            for job in jobs:
                self._end(job, failure)
            return
        if vectors is None:
            return  # all of them are over, and dropped by the next step
        for (job, _), vector in zip(chosen, vectors, strict=True):
            job.vectors.append(vector)
        for job in jobs:
            if len(job.vectors) == len(job.tokens):
                self._end(job, job.vectors)

    def _tokens(self, request: Embedding, index: int) -> list[int]:
        given = request.inputs[index]
        tokens = self._backend.tokenize(given) if isinstance(given, str) else list(given)
        limit = self._backend.context_length
        if not tokens:
            raise InvalidError("inference.prompt_empty", f"input {index} holds no token", hint="send some text")
        if not isinstance(given, str) and not all(0 <= token < self._backend.vocabulary for token in tokens):
            raise InvalidError(
                "inference.prompt_unreadable", f"input {index} holds numbers that are no tokens of this model"
            )
        if len(tokens) > limit and request.truncate:
            return self._backend.cut(tokens)
        if len(tokens) > limit:
            raise InvalidError(
                "inference.context_length_exceeded",
                f"input {index} has {len(tokens)} tokens; this model takes {limit}",
                hint="shorten or split the input",
                index=index,
                prompt_tokens=len(tokens),
                context_length=limit,
            )
        return tokens

    def _plan(self) -> list[tuple[_Job, list[int]]]:
        """Return the next batch: one input of each request in turn, as long as they fit."""
        chosen: list[tuple[_Job, list[int]]] = []
        room = self._backend.batch_size
        passed = 0
        while self._jobs and passed < len(self._jobs) and len(chosen) < self._backend.parallel:
            job = self._jobs[0]
            self._jobs.rotate(-1)
            if job.taken == len(job.tokens) or (chosen and len(job.tokens[job.taken]) > room):
                passed += 1
                continue
            passed = 0
            tokens = job.tokens[job.taken]
            job.taken += 1
            room -= len(tokens)
            chosen.append((job, tokens))
        return chosen

    def _drop(self) -> None:
        for job in list(self._jobs):
            why = self._why_over(job)
            if why is not None:
                self._end(job, why)

    def _why_over(self, job: _Job) -> UnavailableError | None:
        """Return why nobody waits for a request any longer, None if somebody does."""
        if job.request.cancelled:
            return UnavailableError("inference.client_disconnected", "the client went away")
        if job.request.deadline_s is not None and self._clock() >= job.request.deadline_s:
            return UnavailableError("inference.deadline_exceeded", "the request's time is over")
        return None

    def _end(self, job: _Job, result: list[Vector] | GarrisonError) -> None:
        self._jobs.remove(job)
        job.request.on_done(result)


def normalised(vector: Vector, dimensions: int | None) -> Vector:
    """Return the first ``dimensions`` values (None: all) as a vector of length one.

    Raises:
        UnavailableError: ``inference.not_finite``: the model yields no numbers, or nothing but zeros.
    """
    cut: npt.NDArray[Any] = vector[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(cut))
    if not np.isfinite(length) or length == 0:
        raise UnavailableError(
            "inference.not_finite", "the model's vector for an input is no direction: it may be damaged"
        )
    return (cut / length).astype(np.float32)
