"""What a text engine is asked and what it answers: the words between the APIs, the batcher, and the backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from garrison_protocol.errors import GarrisonError

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Options:
    """How one answer is made. ``temperature`` 0 is greedy; ``max_tokens`` None: as far as the context reaches.

    Presence and frequency penalties count the answer's own tokens, as OpenAI says; the repeat penalty counts the last
    ``REPEAT_WINDOW`` tokens, the prompt's included, as llama.cpp and Ollama do.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    """Go on after the model's own end, for measurements."""
    top_logprobs: int | None = None
    """None: no log-probabilities; otherwise each token's own, and those of so many alternatives."""
    grammar: str | None = None
    """GBNF with the rule ``root``; the answer is a text of it."""
    grammar_triggers: tuple[str, ...] = ()
    """With some, the grammar holds only from the first of these texts on, which is part of what it describes."""


REPEAT_WINDOW = 64


class TokenLogprob(NamedTuple):
    """How likely the model found a token that it said, before sampling changed anything, and what else it thought of.

    ``top``: the likeliest tokens as (bytes, natural logarithm), likeliest first. A control token has its name's bytes.
    """

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


class Delta(NamedTuple):
    """What a step adds to one answer. The first one is empty: the request was accepted.

    ``logprobs``, if they were asked for: the tokens that ``text`` was made of. Tokens whose text is held back, because
    it may become a stop string, come with it; those of a stop string itself never come.
    """

    text: str
    finish: Finish | None
    logprobs: tuple[TokenLogprob, ...] = ()


class _Stoppable:
    """A request whose owner may lose interest in it."""

    cancelled: bool
    on_cancel: Callable[[], None] | None
    deadline_s: float | None = None

    def cancel(self) -> None:
        """End it before its next token; from any thread."""
        self.cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    def ended(self, now: float) -> bool:
        """Tell whether nobody wants more of it: it was cancelled, or its deadline has passed."""
        return self.cancelled or (self.deadline_s is not None and now >= self.deadline_s)


@dataclass(eq=False)
class Generation(_Stoppable):
    """One request. Its owner calls ``cancel``; the batching thread sets the counts, last of all before ``finish``.

    ``prompt``: text, or tokens as they are. ``app``: whose it is; those who wait are served in turn. ``deadline_s``:
    the time of ``time.monotonic`` at which it ends with ``inference.deadline_exceeded``.
    """

    prompt: str | tuple[int, ...]
    options: Options
    on_delta: Callable[[Delta], None]
    app: str = ""
    deadline_s: float | None = None
    cancelled: bool = False
    on_cancel: Callable[[], None] | None = field(default=None, repr=False)
    """Set by whoever runs it: interrupts what is being computed, if that is worth it."""
    error: GarrisonError | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None


@dataclass(eq=False)
class Scoring(_Stoppable):
    """Mean log-probability per token of each of ``choices`` after ``prompt``; NaN where there is none.

    A cancelled one never calls ``on_done``.
    """

    prompt: str
    choices: tuple[str, ...]
    on_done: Callable[[list[float] | GarrisonError], None]
    cancelled: bool = False
    on_cancel: Callable[[], None] | None = field(default=None, repr=False)


class Output(NamedTuple):
    """A delta and the request it belongs to."""

    generation: Generation
    delta: Delta
