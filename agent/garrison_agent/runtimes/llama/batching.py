"""Continuous batching: many requests in one decode call, over any backend. One thread owns it; others may ``poke``.

Each step puts the newest token of every running answer and the next part of the unread prompts into one batch of at
most ``batch_size`` tokens. A request joins between two steps and leaves as soon as it ends or is cancelled. Once every
place is taken, applications share them: an answer that had its turn is paused for an application with fewer places,
and goes on later from where it was, so nobody waits for somebody else's long answer. While answers run, a prompt is
read in parts that hold them up only shortly; a prompt that begins like one that is just being read waits and takes
that part over.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from garrison_agent.runtimes.llama.backend import Backend, DecodeError, InterruptedDecodeError, Row, Sampler
from garrison_agent.runtimes.llama.choices import ChoiceScorer
from garrison_agent.runtimes.llama.generation import (
    Delta,
    Finish,
    Generation,
    Options,
    Output,
    Scoring,
    TokenLogprob,
)
from garrison_agent.runtimes.llama.logprob_stream import LogprobStream
from garrison_agent.runtimes.llama.pace import Pace
from garrison_agent.runtimes.llama.prefix_store import PrefixStore, shared
from garrison_agent.runtimes.llama.prompts import check_options, check_prompt
from garrison_agent.runtimes.llama.sequences import Place, Sequences
from garrison_agent.runtimes.llama.text_stream import TextStream
from garrison_agent.runtimes.llama.turns import Turns, makes_way
from garrison_protocol.errors import GarrisonError, UnavailableError

__all__ = [
    "MAX_WAITING",
    "MAX_WAITING_APP",
    "PREFIX_STORE_BYTES",
    "Batcher",
    "Delta",
    "Finish",
    "Generation",
    "Options",
    "Output",
    "Scoring",
    "TokenLogprob",
]

MAX_WAITING_APP = 64
MAX_WAITING = 256
"""Of all applications together: one that fills its own line leaves room for others."""
PREFIX_STORE_BYTES = 64 << 20
TURN_TOKENS = 128
"""An answer that is paused has got at least so many since it began or went on: pausing may cost reading it again."""
WORTH_WAITING = 32
"""Tokens that another prompt will have read soon: fewer are read at once."""
WORTH_REDOING = 8
"""A batch is interrupted if it reads so many times more for those who left than for those who stay."""


@dataclass(eq=False)
class _Waiting:
    """A request without a place."""

    generation: Generation
    prompt: list[int]
    sampler: Sampler
    paused: _Answer | None = None
    """What there is of its answer, if that was paused; ``prompt`` goes as far."""


@dataclass(eq=False)
class _Answer:
    """A generation in a place, or paused."""

    generation: Generation
    prompt: list[int]
    limit: int
    """Tokens that may be generated."""
    sampler: Sampler
    place: Place
    text: TextStream
    logprobs: LogprobStream = field(default_factory=LogprobStream)
    reading: bool = False
    """Whether rows of its prompt were planned; before, it may wait for another prompt."""
    waited: bool = False
    """Whether it did: then it waits for all that they have in common."""
    newest: int | None = None
    """The token that was sampled and not read yet; None while the prompt is being read."""
    turn_began: int = 0
    """How many tokens it had when it got its place."""

    @property
    def turn_tokens(self) -> int:
        """How many tokens it got in its place."""
        return self.generation.completion_tokens - self.turn_began

    def go_on(self, place: Place, tokens: list[int]) -> None:
        """Begin another turn in ``place``; all of ``tokens`` have to be known there again."""
        self.place, self.prompt, self.newest = place, tokens, None
        self.reading = self.waited = False
        self.turn_began = self.generation.completion_tokens


class _Planned:
    """The next batch: its rows, which of them are sampled for whom, and how many each answer has in it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.sampled: list[tuple[int, _Answer]] = []
        self.parts: list[tuple[_Answer, int]] = []
        self.prompt_rows = 0

    def add(self, answer: _Answer, rows: list[Row], *, sampled: bool) -> None:
        """Add rows of one answer; ``sampled``: its next token follows the last of them."""
        self.rows += rows
        self.parts.append((answer, len(rows)))
        if sampled:
            self.sampled.append((len(self.rows) - 1, answer))


class Batcher:
    """The running and waiting requests of one model."""

    def __init__(
        self,
        backend: Backend,
        *,
        clock: Callable[[], float] = time.monotonic,
        store_bytes: int = PREFIX_STORE_BYTES,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._sequences = Sequences(
            backend,
            count=backend.parallel,
            context_length=backend.context_length,
            store=PrefixStore(store_bytes),
        )
        self._running: list[_Answer] = []
        """In the order in which they got their places."""
        self._waiting: Turns[_Waiting] = Turns()
        self._scorings: deque[Scoring] = deque()
        self._scorer = ChoiceScorer(backend, self._sequences, self._decode)
        self._pace = Pace()
        self._guard = threading.Lock()
        self._decoding: Sequence[tuple[Generation | Scoring, int]] = ()
        """Whose rows are being read now, and how many; under ``_guard``."""
        self._redoing = False
        """Whether somebody's rows are read a second time: then to their end, or who leaves often enough stops all."""

    @property
    def active(self) -> int:
        """Requests that hold a sequence."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait for a sequence."""
        return len(self._waiting) + len(self._scorings)

    @property
    def busy(self) -> bool:
        """Tell whether ``step`` has something to do."""
        return bool(self._running or self._waiting or self._scorings)

    def add(self, generation: Generation) -> Output:
        """Accept or refuse a request; the output says which."""
        try:
            if generation.deadline_s is not None and generation.deadline_s <= self._clock():
                raise _too_late()
            self._check_queue(generation.app)
            prompt = generation.prompt
            tokens = self._backend.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
            generation.prompt_tokens = len(tokens)
            check_prompt(self._backend, tokens)
            check_options(self._backend, generation.options)
            sampler = self._backend.sampler(generation.options, tokens)
        except GarrisonError as error:
            generation.error = error
            return Output(generation, Delta("", "error"))
        self._waiting.add(generation.app, _Waiting(generation, tokens, sampler))
        return Output(generation, Delta("", None))

    def add_scoring(self, scoring: Scoring) -> None:
        """Queue a scoring; it runs alone, between two steps, as soon as a sequence is free."""
        self._scorings.append(scoring)

    def poke(self) -> None:
        """Look whether the batch being read is still wanted, and interrupt it if not. From any thread.

        Whoever cancels a request or sees its deadline pass calls this. If others share the batch, it is read to its
        end unless their few rows are cheap to read again, and were not read in vain just before.
        """
        with self._guard:
            now = self._clock()
            left = sum(rows for request, rows in self._decoding if request.ended(now))
            stay = sum(rows for _, rows in self._decoding) - left
            worth_it = self._backend.trims and not self._redoing and left >= WORTH_REDOING * stay
            if left and (not stay or worth_it):
                self._backend.interrupt(True)

    def step(self) -> list[Output]:
        """Do one decode call's worth of work and return what it added."""
        outputs = self._drop_ended()
        self._score_next()
        self._admit()
        planned = self._plan()
        if not planned.rows:
            return outputs
        began = self._clock()
        try:
            self._decode(planned.rows, [(answer.generation, rows) for answer, rows in planned.parts])
        except InterruptedDecodeError:
            for answer, rows in planned.parts:
                self._take_back(answer, rows)
            self._redoing = not all(answer.generation.ended(began) for answer, _ in planned.parts)
            return outputs
        except DecodeError as error:
            return outputs + self._fail_all(error)
        self._redoing = False
        now = self._clock()
        if planned.prompt_rows:
            self._pace.learn(len(planned.rows), now - began)
        for row, answer in planned.sampled:
            outputs.append(self._extend(answer, row, now))
        return outputs

    def _check_queue(self, app: str) -> None:
        waiting = self._waiting.line(app)
        if waiting >= MAX_WAITING_APP or len(self._waiting) >= MAX_WAITING:
            raise UnavailableError(
                "inference.queue_full",
                f"{waiting if waiting >= MAX_WAITING_APP else len(self._waiting)} requests wait already",
                hint="send the request again later",
                retryable=True,
            )

    def _drop_ended(self) -> list[Output]:
        """End what was cancelled or is too late."""
        now = self._clock()
        outputs = []
        if self._waiting:
            for waiting in self._waiting.remove(lambda waiting: waiting.generation.ended(now)):
                waiting.sampler.close()
                outputs.append(_farewell(waiting.generation))
        for answer in [answer for answer in self._running if answer.generation.ended(now)]:
            self._release(answer)
            outputs.append(_farewell(answer.generation))
        return outputs

    def _admit(self) -> None:
        """Give waiting requests a place."""
        while self._waiting and (self._sequences.has_free or self._pause_one()):
            waiting = self._waiting.pop()
            tokens, options = waiting.prompt, waiting.generation.options
            place = self._sequences.take(tokens, _readable(tokens))
            assert place is not None
            if waiting.paused is not None:
                waiting.paused.go_on(place, tokens)
                self._running.append(waiting.paused)
                continue
            room = self._backend.context_length - len(tokens)
            limit = room if options.max_tokens is None else min(options.max_tokens, room)
            text = TextStream(options.stop)
            self._running.append(_Answer(waiting.generation, tokens, limit, waiting.sampler, place, text))

    def _pause_one(self) -> bool:
        """Pause an answer for an application that waits with fewer places, and let that be next.

        False: nobody has to make way, or no answer of those who do had its turn yet.
        """
        held = Counter(answer.generation.app for answer in self._running)
        poorest = min(self._waiting.keys, key=held.__getitem__)
        had_turn = [
            answer
            for answer in self._running
            if answer.newest is not None
            and answer.turn_tokens >= TURN_TOKENS
            and makes_way(held[answer.generation.app], held[poorest])
        ]
        if not had_turn:
            return False
        answer = max(had_turn, key=lambda answer: (held[answer.generation.app], answer.turn_tokens))
        assert answer.newest is not None
        generation, place = answer.generation, answer.place
        self._sequences.give_back(place)
        self._running.remove(answer)
        tokens = [*place.known, answer.newest]
        self._waiting.add_first(generation.app, _Waiting(generation, tokens, answer.sampler, answer))
        self._waiting.prefer(poorest)
        return True

    def _plan(self) -> _Planned:
        """Return the next batch."""
        # What is taken over must have been read: this comes before the places know of the rows planned here.
        unread = [answer for answer in self._running if answer.newest is None]
        unread = [answer for answer in unread if answer.reading or self._begin_reading(answer)]
        planned = _Planned()
        rows = planned.rows
        for answer in self._running:
            if answer.newest is not None:
                place = answer.place
                planned.add(answer, [Row(answer.newest, len(place.known), place.sequence, True)], sampled=True)
                place.known.append(answer.newest)
        room = min(self._backend.batch_size - len(rows), self._pace.rows(len(rows))) if unread else 0
        for answer in unread:
            place, prompt = answer.place, answer.prompt
            start = len(place.known)
            part = prompt[start : start + room]
            if not part:
                break
            last = len(prompt) - 1
            more = [Row(token, at, place.sequence, at == last) for at, token in enumerate(part, start)]
            planned.add(answer, more, sampled=more[-1].wanted)
            planned.prompt_rows += len(part)
            place.known.extend(part)
            room -= len(part)
        return planned

    def _begin_reading(self, answer: _Answer) -> bool:
        """Take over what is known of its prompt by now; False if it is better to wait for a prompt being read."""
        prompt, place = answer.prompt, answer.place
        limit = _readable(prompt)
        self._sequences.catch_up(place, prompt, limit)
        if self._backend.trims:
            for other in self._running:
                if other is answer:
                    break  # those that came later may wait for this one, never the other way round
                if other.newest is not None:
                    continue
                coming = shared(other.prompt, prompt, limit) - len(place.known)
                if coming >= (1 if answer.waited else WORTH_WAITING):
                    answer.waited = True
                    return False
        if not answer.generation.completion_tokens:
            answer.generation.cached_tokens = len(place.known)
        answer.reading = True
        return True

    def _decode(self, rows: Sequence[Row], whose: Sequence[tuple[Generation | Scoring, int]]) -> None:
        with self._guard:
            self._backend.interrupt(False)
            self._decoding = whose
        try:
            self.poke()  # somebody may have left since the batch was planned
            self._backend.decode(rows)
        finally:
            with self._guard:
                self._decoding = ()

    def _take_back(self, answer: _Answer, rows: int) -> None:
        """Undo the planning of rows that were not read."""
        place = answer.place
        self._sequences.cut(place, len(place.known) - rows if self._backend.trims else 0)

    def _extend(self, answer: _Answer, row: int, now: float) -> Output:
        """Sample one token and return what it adds to the answer."""
        generation = answer.generation
        options = generation.options
        try:
            token = answer.sampler.sample(row)
        except GarrisonError as error:
            generation.error = error
            return self._finished(answer, Delta("", "error"))
        if generation.first_token_at is None:
            generation.first_token_at = now
        generation.last_token_at = now
        if token is None or (self._backend.ends(token) and not options.ignore_end):
            return self._finished(answer, self._rest(answer, "stop"))
        generation.completion_tokens += 1
        answer.newest = token
        stream = answer.text
        text = stream.push(self._backend.piece(token) or self._shown_name(token, options))
        logprobs: tuple[TokenLogprob, ...] = ()
        if options.top_logprobs is not None:
            logprob = self._backend.token_logprob(row, token, options.top_logprobs)
            logprobs = answer.logprobs.push(logprob, text, stream.held_characters, stopped=stream.stopped)
        if stream.stopped:
            return self._finished(answer, Delta(text, "stop", logprobs))
        if generation.completion_tokens >= answer.limit:
            rest = self._rest(answer, "length")
            return self._finished(answer, Delta(text + rest.text, rest.finish, logprobs + rest.logprobs))
        return Output(generation, Delta(text, None, logprobs))

    def _shown_name(self, token: int, options: Options) -> bytes:
        """Return the name of a control token that the answer's grammar or its triggers are about."""
        if options.grammar is None:
            return b""
        name, triggers = self._backend.name(token), options.grammar_triggers
        return name if not triggers or any(name in trigger.encode() for trigger in triggers) else b""

    def _rest(self, answer: _Answer, finish: Finish) -> Delta:
        """Return what was held back, with the finish that it makes of ``finish``."""
        text = answer.text.finish()
        logprobs = answer.logprobs.finish(text, stopped=answer.text.stopped)
        return Delta(text, "stop" if answer.text.stopped else finish, logprobs)

    def _finished(self, answer: _Answer, delta: Delta) -> Output:
        self._release(answer)
        return Output(answer.generation, delta)

    def _release(self, answer: _Answer) -> None:
        answer.sampler.close()
        self._sequences.give_back(answer.place)
        self._running.remove(answer)

    def _fail_all(self, error: DecodeError) -> list[Output]:
        """End every running request: after a failed batch nothing in the backend can be relied on."""
        self._sequences.lose_all()
        outputs = []
        for answer in list(self._running):
            answer.generation.error = _failed(error)
            outputs.append(self._finished(answer, Delta("", "error")))
        return outputs

    def _score_next(self) -> None:
        """Run one waiting scoring if a sequence is free."""
        if not self._scorings:
            return
        place = self._sequences.take_oldest()
        if place is None:
            return
        scoring = self._scorings.popleft()
        try:
            if not scoring.cancelled:
                scoring.on_done(self._scorer.score(place, scoring))
        except GarrisonError as error:
            scoring.on_done(error)
        except InterruptedDecodeError:
            self._sequences.cut(place, 0)
        except DecodeError as error:
            self._sequences.cut(place, 0)
            scoring.on_done(_failed(error))
        finally:
            self._sequences.give_back(place)


def _readable(tokens: Sequence[int]) -> int:
    """Return how much of a prompt may be taken over: its last token's logits are what the answer begins with."""
    return len(tokens) - 1


def _farewell(generation: Generation) -> Output:
    """Return the end of a request that was cancelled or is too late."""
    if generation.cancelled:
        return Output(generation, Delta("", "cancelled"))
    generation.error = _too_late()
    return Output(generation, Delta("", "error"))


def _too_late() -> UnavailableError:
    return UnavailableError(
        "inference.deadline_exceeded",
        "the request's deadline passed before its answer was complete",
        hint="give it more time, or ask for less",
    )


def _failed(error: DecodeError) -> UnavailableError:
    return UnavailableError("inference.decode_failed", str(error), hint="send the request again", retryable=True)
