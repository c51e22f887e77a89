"""Clients of a batcher, for tests: each collects its own answer."""

from __future__ import annotations

from typing import Any

from garrison_agent.runtimes.llama.batching import Batcher
from garrison_agent.runtimes.llama.generation import Delta, Generation, Options, Output


class Client:
    """Collects one answer."""

    def __init__(
        self, prompt: str | tuple[int, ...], *, app: str = "", deadline_s: float | None = None, **options: Any
    ) -> None:
        self.text = ""
        self.finish: str | None = None
        self.deltas: list[Delta] = []
        self.generation = Generation(prompt, Options(**options), self.hear, app=app, deadline_s=deadline_s)

    @property
    def code(self) -> str | None:
        """The code of its error."""
        return None if self.generation.error is None else self.generation.error.code

    @property
    def pieces(self) -> bytes:
        """The tokens whose log-probabilities came."""
        return b"".join(one.piece for delta in self.deltas for one in delta.logprobs)

    def hear(self, delta: Delta) -> None:
        assert self.finish is None, "nothing comes after the end"
        self.deltas.append(delta)
        self.text += delta.text
        self.finish = delta.finish


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def deliver(outputs: list[Output]) -> None:
    for generation, delta in outputs:
        generation.on_delta(delta)


def run(batcher: Batcher, *clients: Client) -> None:
    deliver([batcher.add(client.generation) for client in clients])
    for _ in range(500):
        if not batcher.busy:
            return
        deliver(batcher.step())
    raise AssertionError("the batcher never came to rest")
