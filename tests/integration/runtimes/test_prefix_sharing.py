"""What a prompt takes over from others, never read again, is what reading it alone would have given.

A walk of requests whose prompts overlap in every way (extended, cut, forked, repeated), four at a time, some of whose
clients leave: before the answer, in the middle of it, or at once. Each token of each answer comes with its likeliest
alternatives; the same engine then reads each text from an empty memory. A cell of somebody else's text, a position off
by one, or a token left out moves these numbers by whole units; rounding does not.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from garrison_agent.runtimes.llama.backend import Row
from garrison_agent.runtimes.llama.native_backend import LlamaBackend
from garrison_agent.runtimes.llama.prefix_store import shared
from tests.integration.runtimes.workers import WatchedWorker, eventually, llama_spec, smollm2

pytestmark = pytest.mark.integration

SEED = 20261124
REQUESTS = 48
AT_ONCE = 4
ANSWER = 4
TOP = 20
CONTEXT = 384
ROUNDING = 0.6
"""Weights of four bits make much of the order of sums: the same text read in other parts differs by up to 0.4."""
WORDS = [
    "the",
    "lighthouse",
    "keeper",
    "wrote",
    "that",
    "ships",
    "at",
    "night",
    "follow",
    "a",
    "red",
    "lamp",
    "while",
    "storms",
    "from",
    "the",
    "north",
    "bring",
    "cold",
    "rain",
    "and",
    "old",
    "sailors",
    "count",
    "waves",
    "until",
    "morning",
    "when",
    "gulls",
    "return",
    "to",
    "the",
    "harbour",
    "and",
    "children",
    "sell",
    "bread",
    "near",
    "seven",
    "boats",
]


class Asked(NamedTuple):
    """A request of the walk. ``leaves``: after how many events its client goes away; None: it stays."""

    prompt: tuple[int, ...]
    leaves: int | None


class Heard(NamedTuple):
    """A token of an answer: what it is, and how likely the model found it and others, by name."""

    name: str
    likeliest: dict[str, float]


@pytest.fixture(scope="module")
def worker(short_folder: Path) -> Iterator[WatchedWorker]:
    """A worker with too few sequences for the walk, and a store too small for it."""
    settings = {"prefix_cache_mb": 12}
    spec = llama_spec(
        smollm2(), short_folder / "walk.sock", context_length=CONTEXT, parallel=AT_ONCE, settings=settings
    )
    with WatchedWorker(spec) as worker:
        worker.ready()
        yield worker


def walk(seed: int, alone: Alone, count: int) -> list[Asked]:
    """Return requests each of which mostly begins like an earlier one."""
    draw = random.Random(seed)
    prompts: list[tuple[int, ...]] = []
    asked = []
    for _ in range(count):
        start: tuple[int, ...] = ()
        if prompts and draw.random() < 0.9:
            start = draw.choice(prompts[-12:] if draw.random() < 0.7 else prompts)
            if draw.random() < 0.5:
                start = start[: draw.randrange(1, len(start) + 1)]
        new = draw.choice((0, 1, 3, 10, 40, 120, CONTEXT // 3))
        words = " ".join(draw.choice(WORDS) for _ in range(new))
        prompt = (start + (alone.tokens(" " + words) if words else ()))[: CONTEXT - 16] or alone.tokens("Once")
        prompts.append(prompt)
        asked.append(Asked(prompt, draw.choice((None, None, None, 0, 1, 3))))
    return asked


def ask(worker: WatchedWorker, asked: Asked) -> list[Heard] | None:
    """Return the answer's tokens; None if the client left."""
    body = {"prompt": asked.prompt, "temperature": 0, "max_tokens": ANSWER, "logprobs": TOP, "ignore_eos": True}
    connection = worker.connect()
    with contextlib.closing(connection):
        if asked.leaves is None:
            connection.request("POST", "/v1/completions", json.dumps(body).encode())
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200, answer
            return list(tokens_of(answer["choices"][0]["logprobs"]))
        connection.request("POST", "/v1/completions", json.dumps({**body, "max_tokens": 60, "stream": True}).encode())
        if asked.leaves:
            response = connection.getresponse()
            for _ in range(asked.leaves * 2):
                response.readline()
            response.close()
    return None


def tokens_of(logprobs: dict[str, Any]) -> Iterator[Heard]:
    """Yield the tokens of a choice with ``logprobs``."""
    for name, likeliest in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        yield Heard(name, likeliest)


class Alone:
    """The engine with one sequence and nothing else: what its texts have in common, it keeps from one to the next."""

    def __init__(self) -> None:
        self._backend = LlamaBackend(str(smollm2()), threads=1, context_length=CONTEXT, parallel=1)
        self._read: list[int] = []
        names: dict[str, list[int]] = {}
        for token in range(self._backend.vocabulary):
            names.setdefault(self._backend.name(token).decode("utf-8", "replace"), []).append(token)
        # Parts of characters all look alike in JSON: they are no token's name.
        self._tokens = {name: tokens[0] for name, tokens in names.items() if len(tokens) == 1}

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.tokenize(text))

    def distance(self, prompt: Sequence[int], answer: Sequence[Heard]) -> float:
        """Return by how much the numbers of ``answer`` differ, at most, from those of the same text here."""
        text, furthest = list(prompt), 0.0
        for heard in answer:
            expected = self._likeliest(text)
            for name in heard.likeliest.keys() & self._tokens.keys():
                # What is last in one list may be missing in the longer other one; the first ones may not.
                other = expected.get(name, min(expected.values()) - 1)
                furthest = max(furthest, abs(heard.likeliest[name] - other))
            if heard.name not in self._tokens:
                break
            text.append(self._tokens[heard.name])
        return furthest

    def _likeliest(self, text: list[int]) -> dict[str, float]:
        start = min(shared(self._read, text, len(text)), len(text) - 1)
        assert self._backend.forget(0, start)
        last = len(text) - 1
        self._backend.decode([Row(text[at], at, 0, at == last) for at in range(start, len(text))])
        self._read = list(text)
        top = self._backend.token_logprob(last - start, text[-1], 4 * TOP).top
        return {piece.decode("utf-8", "replace"): value for piece, value in top}


def test_overlapping_prompts_mean_the_same_as_alone(worker: WatchedWorker) -> None:
    alone = Alone()
    asked = walk(SEED, alone, REQUESTS)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda one: ask(worker, one), asked))
    eventually(lambda: worker.health()["active"] == 0, "everybody was answered or has left")
    told = [(one.prompt, answer) for one, answer in zip(asked, answers, strict=True) if answer is not None]
    assert len(told) > REQUESTS // 3
    far = [
        (len(prompt), round(alone.distance(prompt, answer), 2)) for prompt, answer in sorted(told, key=itemgetter(0))
    ]
    assert [pair for pair in far if pair[1] > ROUNDING] == []
