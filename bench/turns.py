"""Two long conversations that take turns: what each new question costs until its first token comes."""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.result import Budget, Findings, Measure
from bench.servers import python_server
from bench.serving import TEXT, serving_board
from bench.streams import Streamed, stream

TURNS = 7
ANSWER_TOKENS = 16
_SENTENCE = "The {place} lies {number} kilometres behind the hills, and in its harbour {number} boats wait for wind. "
_SENTENCES = 40
"""About 1,000 of SmolLM2's tokens."""


class Conversation:
    """Messages that grow by one question and one answer a turn."""

    def __init__(self, place: str) -> None:
        self._place = place
        text = "".join(_SENTENCE.format(place=place, number=number) for number in range(3, 3 + _SENTENCES))
        self._messages = [{"role": "user", "content": text + "How many boats wait?"}]

    def body(self) -> dict[str, Any]:
        """Return the request that asks for the next answer."""
        return {
            "model": TEXT,
            "messages": self._messages,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "logit_bias": {"2": -100, "0": -100},
        }

    def go_on(self, answer: Streamed, turn: int) -> None:
        """Add the answer and the next question."""
        self._messages.append({"role": "assistant", "content": answer.text})
        self._messages.append({"role": "user", "content": f"And {turn} kilometres behind the {self._place}?"})


def measure(folder: Path) -> Findings:
    """Return the time to first token from the second turn on; takes about two minutes.

    Raises:
        StepError: A server did not start.
    """
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    with ExitStack() as stack:
        board = stack.enter_context(serving_board(folder, TEXT, threads=threads, parallel=4))
        python = stack.enter_context(python_server(folder, threads=threads))
        found = {port: _first_tokens_s(port) for port in (board.port, python.port)}
    ours, theirs = found[board.port], found[python.port]
    ratios = tuple(one / other for one, other in zip(ours, theirs, strict=True))
    return Findings(
        f"SmolLM2-135M Q4_1, two conversations of about 1,000 tokens that alternate, {TURNS} turns each after the"
        f" first, answers of {ANSWER_TOKENS} tokens, threads = {threads}; the same questions to both servers, one after"
        " the other; each has answered the first turns before the clock starts",
        (
            Measure(
                "first token of a turn",
                1000 * statistics.median(ours),
                "ms",
                1000 * statistics.median(theirs),
                python.name,
                statistics.median(ratios),
                Budget(f"≤ 0.15 x {python.name}", 0.15, at_least=False, of_ratio=True),
                ratios,
            ),
        ),
    )


def _first_tokens_s(port: int) -> list[float]:
    conversations = [Conversation("village"), Conversation("monastery")]
    found = []
    for turn in range(TURNS + 1):
        for conversation in conversations:
            answer = stream(port, "/v1/chat/completions", conversation.body())
            conversation.go_on(answer, turn)
            if turn:
                found.append(answer.to_first_s)
    return found
