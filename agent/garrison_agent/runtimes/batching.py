"""Continuous batching: many requests in one decode call, over any backend. Not thread-safe; one thread owns it.

Each step puts the newest token of every running answer and the next part of every unread prompt into one batch of at
most ``batch_size`` tokens. A request joins between two steps and leaves as soon as it ends or is cancelled, so nobody
waits for somebody else's answer, and a cancelled prompt costs at most the part being decoded.

A finished sequence's keys and values stay until its place is needed: a request whose prompt begins with the same
tokens (the next turn of a conversation) reads only the rest.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from garrison_agent.runtimes.text_stream import TextStream
from garrison_protocol.errors import GarrisonError, InvalidError, UnavailableError

MAX_WAITING = 64

Finish = Literal["stop", "length", "cancelled", "error"]


class Row(NamedTuple):
    """One token of a batch. ``wanted``: its logits are read afterwards, under the row's index."""

    token: int
    position: int
    sequence: int
    wanted: bool


class DecodeError(Exception):
    """The backend could not decode a batch; the sequences in it are lost."""


class Sampler(Protocol):
    """Chooses tokens for one answer."""

    def sample(self, row: int) -> int:
        """Return the token that follows ``row`` of the last batch."""

    def close(self) -> None:
        """Free the native sampler."""


class Backend(Protocol):
    """A loaded model with ``parallel`` sequences of ``context_length`` tokens each."""

    context_length: int
    parallel: int
    batch_size: int
    scored_rows: int
    """How many rows of one batch may be ``wanted`` for scoring."""

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``, with the model's own beginning."""

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; control tokens have none."""

    def ends(self, token: int) -> bool:
        """Tell whether ``token`` ends an answer."""

    def forget(self, sequence: int, start: int) -> bool:
        """Drop what is known of ``sequence`` from position ``start`` on; False if the model can only drop it whole."""

    def decode(self, rows: Sequence[Row]) -> None:
        """Read ``rows``. Raises ``DecodeError``."""

    def sampler(self, options: Options) -> Sampler:
        """Return a sampler for one answer."""

    def log_probability(self, row: int, token: int) -> float:
        """Return the natural logarithm of the probability of ``token`` after ``row``; NaN if there is none."""


@dataclass(frozen=True)
class Options:
    """How one answer is made. ``temperature`` 0 is greedy; ``max_tokens`` None: as far as the context reaches."""

    max_tokens: int | None = None
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    """Go on after the model's own end, for measurements."""


class Delta(NamedTuple):
    """What a step adds to one answer. The first one is empty: the request was accepted."""

    text: str
    finish: Finish | None


@dataclass(eq=False)
class Generation:
    """One request. Its owner sets ``cancelled``; the batching thread sets the rest, last of all before ``finish``."""

    prompt: str
    options: Options
    on_delta: Callable[[Delta], None]
    cancelled: bool = False
    error: GarrisonError | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None


@dataclass(eq=False)
class Scoring:
    """Mean log-probability per token of each of ``choices`` after ``prompt``; NaN where there is none."""

    prompt: str
    choices: tuple[str, ...]
    on_done: Callable[[list[float] | GarrisonError], None]
    cancelled: bool = False


class Output(NamedTuple):
    """A delta and the request it belongs to."""

    generation: Generation
    delta: Delta


@dataclass(eq=False)
class _Answer:
    """A generation in a place."""

    generation: Generation
    prompt: list[int]
    limit: int
    """Tokens that may be generated."""
    sampler: Sampler
    text: TextStream
    newest: int | None = None
    """The token that was sampled and not read yet; None while the prompt is being read."""


@dataclass(eq=False)
class _Place:
    """A sequence of the backend and the tokens whose keys and values it holds."""

    sequence: int
    known: list[int] = field(default_factory=list)
    answer: _Answer | None = None
    used_at: int = 0


class Batcher:
    """The running and waiting requests of one model."""

    def __init__(self, backend: Backend, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._places = [_Place(sequence) for sequence in range(backend.parallel)]
        self._waiting: deque[tuple[Generation, list[int]]] = deque()
        self._scorings: deque[Scoring] = deque()
        self._uses = 0

    @property
    def active(self) -> int:
        """Requests that hold a sequence."""
        return sum(place.answer is not None for place in self._places)

    @property
    def queued(self) -> int:
        """Requests that wait for a sequence."""
        return len(self._waiting) + len(self._scorings)

    @property
    def busy(self) -> bool:
        """Tell whether ``step`` has something to do."""
        return bool(self._waiting or self._scorings or self.active)

    def add(self, generation: Generation) -> Output:
        """Accept or refuse a request; the output says which."""
        try:
            if len(self._waiting) >= MAX_WAITING:
                raise UnavailableError(
                    "inference.queue_full",
                    f"{len(self._waiting)} requests wait already",
                    hint="send the request again later",
                    retryable=True,
                )
            tokens = self._backend.tokenize(generation.prompt)
            generation.prompt_tokens = len(tokens)
            self._check_length(len(tokens))
        except GarrisonError as error:
            generation.error = error
            return Output(generation, Delta("", "error"))
        self._waiting.append((generation, tokens))
        return Output(generation, Delta("", None))

    def add_scoring(self, scoring: Scoring) -> None:
        """Queue a scoring; it runs alone, between two steps, as soon as a sequence is free."""
        self._scorings.append(scoring)

    def step(self) -> list[Output]:
        """Do one decode call's worth of work and return what it added."""
        outputs = self._drop_cancelled()
        self._score_next()
        self._admit()
        rows, sampled = self._plan()
        if not rows:
            return outputs
        try:
            self._backend.decode(rows)
        except DecodeError as error:
            return outputs + self._fail_all(error)
        now = self._clock()
        for row, place in sampled:
            outputs.append(self._extend(place, row, now))
        return outputs

    def _check_length(self, tokens: int) -> None:
        if tokens == 0:
            raise InvalidError("inference.prompt_empty", "the prompt holds no token", hint="send some text")
        if tokens >= self._backend.context_length:
            raise InvalidError(
                "inference.context_length_exceeded",
                f"the prompt has {tokens} tokens; this model's context holds {self._backend.context_length}, "
                "and the answer needs room too",
                hint="shorten the prompt",
                prompt_tokens=tokens,
                context_length=self._backend.context_length,
            )

    def _drop_cancelled(self) -> list[Output]:
        gone = [generation for generation, _ in self._waiting if generation.cancelled]
        if gone:
            self._waiting = deque(item for item in self._waiting if not item[0].cancelled)
        for place in self._places:
            if place.answer is not None and place.answer.generation.cancelled:
                gone.append(place.answer.generation)
                self._release(place)
        return [Output(generation, Delta("", "cancelled")) for generation in gone]

    def _admit(self) -> None:
        """Give waiting requests a place, each the free one that knows most of its prompt."""
        while self._waiting:
            tokens = self._waiting[0][1]
            free = [place for place in self._places if place.answer is None]
            if not free:
                return
            generation, _ = self._waiting.popleft()
            # The last token is always read again: its logits are what the answer begins with.
            limit = len(tokens) - 1
            place = max(free, key=lambda place: (_shared(place.known, tokens, limit), -place.used_at))
            self._keep(place, _shared(place.known, tokens, limit))
            self._trim_idle(place)
            generation.cached_tokens = len(place.known)
            room = self._backend.context_length - len(tokens)
            wanted = generation.options.max_tokens
            place.answer = _Answer(
                generation,
                tokens,
                room if wanted is None else min(wanted, room),
                self._backend.sampler(generation.options),
                TextStream(generation.options.stop),
            )

    def _keep(self, place: _Place, count: int) -> None:
        """Forget all but the first ``count`` tokens of a place."""
        self._uses += 1
        place.used_at = self._uses
        if count == len(place.known):
            return
        if not self._backend.forget(place.sequence, count):
            self._backend.forget(place.sequence, 0)
            count = 0
        del place.known[count:]

    def _trim_idle(self, spared: _Place) -> None:
        """Bound what finished answers leave behind: attention passes over it in every step."""
        idle = [place for place in self._places if place.answer is None and place is not spared and place.known]
        idle.sort(key=lambda place: place.used_at)
        while idle and sum(len(place.known) for place in idle) > self._backend.context_length:
            oldest = idle.pop(0)
            self._backend.forget(oldest.sequence, 0)
            oldest.known.clear()

    def _plan(self) -> tuple[list[Row], list[tuple[int, _Place]]]:
        """Return the next batch, and which of its rows are sampled for whom."""
        rows: list[Row] = []
        sampled: list[tuple[int, _Place]] = []
        running = [place for place in self._places if place.answer is not None]
        for place in running:
            answer = place.answer
            if answer is not None and answer.newest is not None:
                sampled.append((len(rows), place))
                rows.append(Row(answer.newest, len(place.known), place.sequence, True))
                place.known.append(answer.newest)
        for place in running:
            answer = place.answer
            if answer is None or answer.newest is not None:
                continue
            start = len(place.known)
            part = answer.prompt[start : start + self._backend.batch_size - len(rows)]
            last = len(answer.prompt) - 1
            rows.extend(Row(token, at, place.sequence, at == last) for at, token in enumerate(part, start))
            place.known.extend(part)
            if part and len(place.known) == len(answer.prompt):
                sampled.append((len(rows) - 1, place))
        return rows, sampled

    def _extend(self, place: _Place, row: int, now: float) -> Output:
        """Sample one token for ``place`` and return what it adds to the answer."""
        answer = place.answer
        assert answer is not None
        generation = answer.generation
        token = answer.sampler.sample(row)
        if generation.first_token_at is None:
            generation.first_token_at = now
        generation.last_token_at = now
        if self._backend.ends(token) and not generation.options.ignore_end:
            return self._finished(place, answer.text.finish(), "stop")
        generation.completion_tokens += 1
        answer.newest = token
        text = answer.text.push(self._backend.piece(token))
        if answer.text.stopped:
            return self._finished(place, text, "stop")
        if generation.completion_tokens >= answer.limit:
            text += answer.text.finish()
            finish: Finish = "stop" if answer.text.stopped else "length"
            return self._finished(place, text, finish)
        return Output(generation, Delta(text, None))

    def _finished(self, place: _Place, text: str, finish: Finish) -> Output:
        answer = place.answer
        assert answer is not None
        self._release(place)
        return Output(answer.generation, Delta(text, finish))

    def _release(self, place: _Place) -> None:
        assert place.answer is not None
        place.answer.sampler.close()
        place.answer = None

    def _fail_all(self, error: DecodeError) -> list[Output]:
        """End every running request: after a failed batch nothing in the backend can be relied on."""
        outputs = []
        for place in self._places:
            self._backend.forget(place.sequence, 0)
            place.known.clear()
            if place.answer is not None:
                place.answer.generation.error = UnavailableError(
                    "inference.decode_failed", str(error), hint="send the request again", retryable=True
                )
                outputs.append(self._finished(place, "", "error"))
        return outputs

    def _score_next(self) -> None:
        """Run one waiting scoring if a sequence is free."""
        free = [place for place in self._places if place.answer is None]
        if not self._scorings or not free:
            return
        scoring = self._scorings.popleft()
        if scoring.cancelled:
            return
        place = min(free, key=lambda place: place.used_at)
        try:
            scoring.on_done(self._score(place, scoring))
        except GarrisonError as error:
            scoring.on_done(error)
        except DecodeError as error:
            self._backend.forget(place.sequence, 0)
            place.known.clear()
            scoring.on_done(UnavailableError("inference.decode_failed", str(error), retryable=True))

    def _score(self, place: _Place, scoring: Scoring) -> list[float]:
        prompt = self._backend.tokenize(scoring.prompt)
        means = []
        for choice in scoring.choices:
            # Tokenised together, since a word's tokens depend on what stands before it.
            whole = self._backend.tokenize(scoring.prompt + choice)
            start = max(1, _shared(prompt, whole, len(prompt)))
            self._check_length(len(whole))
            if len(whole) <= start:
                raise InvalidError("inference.choice_empty", "a choice adds no token to the prompt")
            means.append(self._mean_log_probability(place, whole, start))
        return means

    def _mean_log_probability(self, place: _Place, tokens: list[int], start: int) -> float:
        """Return the mean log-probability of ``tokens[start:]``, each after all those before it."""
        self._keep(place, _shared(place.known, tokens, start - 1))
        total = 0.0
        while len(place.known) < len(tokens) - 1:
            at = len(place.known)
            # Only rows that predict a scored token are wanted, and only so many fit one batch.
            end = min(len(tokens) - 1, at + self._backend.batch_size, max(at, start - 1) + self._backend.scored_rows)
            place.known.extend(tokens[at:end])
            rows = [Row(tokens[i], i, place.sequence, i >= start - 1) for i in range(at, end)]
            self._backend.decode(rows)
            for i in range(max(at, start - 1), end):
                total += self._backend.log_probability(i - at, tokens[i + 1])
        mean = total / (len(tokens) - start)
        return mean if math.isfinite(mean) else math.nan


def _shared(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Return how many tokens ``left`` and ``right`` begin with in common, at most ``limit``."""
    end = min(len(left), len(right), limit)
    return next((at for at in range(end) if left[at] != right[at]), max(end, 0))
