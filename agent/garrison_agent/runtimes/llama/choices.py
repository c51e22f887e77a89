"""How likely a model finds each of several answers. Runs alone, between two steps of the batcher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from garrison_agent.runtimes.llama.backend import Backend, Row
from garrison_agent.runtimes.llama.generation import Scoring
from garrison_agent.runtimes.llama.prefix_store import shared
from garrison_agent.runtimes.llama.prompts import check_prompt
from garrison_agent.runtimes.llama.sequences import Place, Sequences
from garrison_protocol.errors import InvalidError

Decode = Callable[[Sequence[Row], Sequence[tuple[Scoring, int]]], None]
"""Reads rows, told whose they are and how many; raises what a backend raises."""


class ChoiceScorer:
    """Scores in a place that it is given for as long as it takes."""

    def __init__(self, backend: Backend, sequences: Sequences, decode: Decode) -> None:
        self._backend = backend
        self._sequences = sequences
        self._decode = decode

    def score(self, place: Place, scoring: Scoring) -> list[float]:
        """Return the mean log-probability per token of each choice.

        Raises:
            InvalidError: A choice adds nothing, or the context does not hold it.
            DecodeError: The backend failed.
            InterruptedDecodeError: The scoring was cancelled.
        """
        prompt = self._backend.tokenize(scoring.prompt)
        means = []
        for choice in scoring.choices:
            # Tokenised together, since a word's tokens depend on what stands before it.
            whole = self._backend.tokenize(scoring.prompt + choice)
            start = max(1, shared(prompt, whole, len(prompt)))
            check_prompt(self._backend, whole)
            if len(whole) <= start:
                raise InvalidError("inference.choice_empty", "a choice adds no token to the prompt")
            means.append(self._mean(place, whole, start, scoring))
        return means

    def _mean(self, place: Place, tokens: list[int], start: int, scoring: Scoring) -> float:
        """Return the mean log-probability of ``tokens[start:]``, each after all those before it."""
        self._sequences.cut(place, shared(place.known, tokens, start - 1))
        total = 0.0
        while len(place.known) < len(tokens) - 1:
            at = len(place.known)
            # Only rows that predict a scored token are wanted, and only so many fit one batch.
            end = min(
                len(tokens) - 1,
                at + self._backend.batch_size,
                max(at, start - 1) + self._backend.scored_rows,
            )
            place.known.extend(tokens[at:end])
            rows = [Row(tokens[i], i, place.sequence, i >= start - 1) for i in range(at, end)]
            self._decode(rows, [(scoring, len(rows))])
            for i in range(max(at, start - 1), end):
                total += self._backend.log_probability(i - at, tokens[i + 1])
        mean = total / (len(tokens) - start)
        return mean if math.isfinite(mean) else math.nan
