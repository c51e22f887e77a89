"""The decode thread over the counting model: what comes when, and what interrupts it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from garrison_agent.runtimes.llama.backend import Backend
from garrison_agent.runtimes.llama.decode_thread import DecodeThread
from garrison_agent.runtimes.llama.generation import Delta, Generation, Options, Scoring
from tests.unit.runtimes.counting_backend import CountingBackend

LIMIT_S = 30.0


def serve(backend: CountingBackend, test: Callable[[DecodeThread], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        decode = DecodeThread(lambda: (backend, {"name": "counts"}), asyncio.get_running_loop())
        decode.start()
        assert await asyncio.wrap_future(decode.loaded) == {"name": "counts"}
        await asyncio.wait_for(test(decode), LIMIT_S)

    asyncio.run(run())


class Heard:
    """One generation and what the event loop heard of it."""

    def __init__(self, prompt: str, *, deadline_s: float | None = None, **options: Any) -> None:
        self.deltas: list[Delta] = []
        self.ended = asyncio.Event()
        self.generation = Generation(prompt, Options(**options), self._hear, deadline_s=deadline_s)

    def _hear(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish is not None:
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def waits_for_interruption(backend: CountingBackend, began: Callable[[], None]) -> None:
    """Make the next decode call last until it is interrupted, as that of a long prompt does."""

    def decode() -> None:
        began()
        assert backend.interrupted.wait(LIMIT_S)

    backend.while_decoding = decode


def test_an_answer_arrives_in_the_event_loop() -> None:
    async def test(decode: DecodeThread) -> None:
        heard = Heard("a", max_tokens=3)
        decode.submit(heard.generation)
        await heard.ended.wait()
        assert heard.text == "bcd"
        assert heard.deltas[0] == Delta("", None)
        assert decode.context_length == 64

    serve(CountingBackend(), test)


def test_cancelling_stops_what_is_being_read() -> None:
    backend = CountingBackend()

    async def test(decode: DecodeThread) -> None:
        loop, reading = asyncio.get_running_loop(), asyncio.Event()
        waits_for_interruption(backend, lambda: void(loop.call_soon_threadsafe(reading.set)))
        heard = Heard("a" * 30)
        decode.submit(heard.generation)
        await reading.wait()
        heard.generation.cancel()
        await heard.ended.wait()
        assert heard.deltas[-1].finish == "cancelled"

    serve(backend, test)
    assert backend.interruptions == 1


def test_a_deadline_stops_what_is_being_read() -> None:
    backend = CountingBackend()

    async def test(decode: DecodeThread) -> None:
        waits_for_interruption(backend, lambda: None)
        heard = Heard("a" * 30, deadline_s=time.monotonic() + 0.05)
        decode.submit(heard.generation)
        await heard.ended.wait()
        assert heard.generation.error is not None
        assert heard.generation.error.code == "inference.deadline_exceeded"

    serve(backend, test)
    assert backend.interruptions == 1


def test_an_answer_before_its_deadline_leaves_no_alarm() -> None:
    async def test(decode: DecodeThread) -> None:
        heard = Heard("a", max_tokens=1, deadline_s=time.monotonic() + LIMIT_S)
        decode.submit(heard.generation)
        (alarm,) = decode._alarms.values()
        await heard.ended.wait()
        assert heard.text == "b"
        assert alarm.cancelled()
        assert decode._alarms == {}

    serve(CountingBackend(), test)


def test_a_cancelled_scoring_lets_the_next_request_run() -> None:
    backend = CountingBackend(parallel=1)

    async def test(decode: DecodeThread) -> None:
        loop, reading = asyncio.get_running_loop(), asyncio.Event()
        waits_for_interruption(backend, lambda: void(loop.call_soon_threadsafe(reading.set)))
        scores: list[object] = []
        scoring = Scoring("a" * 20, ("b",), scores.append)
        decode.submit(scoring)
        await reading.wait()
        scoring.cancel()
        heard = Heard("a", max_tokens=1)
        decode.submit(heard.generation)
        await heard.ended.wait()
        assert heard.text == "b"
        assert scores == []

    serve(backend, test)


def test_an_errand_runs_between_steps() -> None:
    class Count:
        def __init__(self) -> None:
            self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._loop = asyncio.get_running_loop()

        def run(self, backend: Backend) -> None:
            self._loop.call_soon_threadsafe(self.done.set_result, len(backend.tokenize("abc")))

    async def test(decode: DecodeThread) -> None:
        count = Count()
        decode.submit(count)
        assert await count.done == 3

    serve(CountingBackend(), test)


def void(_: object) -> None:
    """Take a value that nobody needs."""
