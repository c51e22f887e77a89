"""Requests that end early: cancelled or too late, before, between, and in the middle of decode calls."""

from __future__ import annotations

from garrison_agent.runtimes.llama.batching import Batcher, Scoring
from garrison_agent.runtimes.llama.pace import ENOUGH_ROWS
from tests.unit.runtimes.counting_backend import CountingBackend
from tests.unit.runtimes.text_clients import Client, Clock, deliver, run


def begun(batcher: Batcher, *clients: Client, steps: int = 1) -> None:
    deliver([batcher.add(client.generation) for client in clients])
    for _ in range(steps):
        deliver(batcher.step())


def test_a_deadline_ends_a_running_and_a_waiting_request() -> None:
    clock = Clock()
    batcher = Batcher(CountingBackend(parallel=1), clock=clock)
    running, waiting = Client("a", deadline_s=clock.now + 2), Client("b", deadline_s=clock.now + 1)
    begun(batcher, running, waiting)
    assert running.text == "b"
    clock.now += 1
    deliver(batcher.step())
    assert (running.finish, waiting.finish) == (None, "error")
    clock.now += 1
    deliver(batcher.step())
    assert running.finish == "error"
    assert running.code == waiting.code == "inference.deadline_exceeded"
    assert (batcher.active, batcher.queued) == (0, 0)


def test_a_deadline_that_has_passed_already_refuses() -> None:
    clock = Clock()
    backend = CountingBackend()
    client = Client("a", deadline_s=clock.now)
    run(Batcher(backend, clock=clock), client)
    assert client.code == "inference.deadline_exceeded"
    assert len(client.deltas) == 1
    assert backend.batches == []


def test_an_answer_in_time_knows_nothing_of_its_deadline() -> None:
    clock = Clock()
    client = Client("a", max_tokens=3, deadline_s=clock.now + 1)
    run(Batcher(CountingBackend(), clock=clock), client)
    assert (client.text, client.finish, client.code) == ("bcd", "length", None)


def test_a_prompt_is_left_in_the_middle_of_a_decode_call() -> None:
    backend = CountingBackend(batch_size=16)
    batcher = Batcher(backend)
    client = Client("a" * 40)
    client.generation.on_cancel = batcher.poke
    begun(batcher, client)
    backend.while_decoding = client.generation.cancel
    deliver(batcher.step())
    assert backend.interruptions == 1
    deliver(batcher.step())
    assert client.finish == "cancelled"
    assert backend.samplers_open == 0
    assert backend.read == ENOUGH_ROWS


def test_what_was_read_before_an_interruption_is_still_known() -> None:
    backend = CountingBackend(batch_size=16)
    batcher = Batcher(backend)
    gone = Client("a" * 40)
    gone.generation.on_cancel = batcher.poke
    begun(batcher, gone)
    backend.while_decoding = gone.generation.cancel
    deliver(batcher.step())
    again = Client("a" * 40, max_tokens=1)
    run(batcher, again)
    assert again.generation.cached_tokens == ENOUGH_ROWS
    assert again.text == "b"


def test_a_deadline_interrupts_too_once_somebody_looks() -> None:
    clock = Clock()
    backend = CountingBackend()
    batcher = Batcher(backend, clock=clock)
    client = Client("a" * 20, deadline_s=clock.now + 1)
    begun(batcher, client, steps=0)

    def time_passes() -> None:
        clock.now += 1
        batcher.poke()

    backend.while_decoding = time_passes
    deliver(batcher.step())
    deliver(batcher.step())
    assert backend.interruptions == 1
    assert client.code == "inference.deadline_exceeded"


def test_who_stays_is_not_interrupted_for_a_few_rows() -> None:
    backend = CountingBackend()
    batcher = Batcher(backend)
    stays, goes = Client("a", max_tokens=5), Client("k", max_tokens=5)
    goes.generation.on_cancel = batcher.poke
    begun(batcher, stays, goes)
    backend.while_decoding = goes.generation.cancel
    run(batcher)
    assert backend.interruptions == 0
    assert (stays.text, goes.finish) == ("bcdef", "cancelled")


def test_a_few_rows_of_who_stays_are_read_again() -> None:
    backend = CountingBackend(batch_size=16)
    batcher = Batcher(backend)
    stays = Client("a", max_tokens=6)
    begun(batcher, stays)
    goes = Client("k" * 50)
    goes.generation.on_cancel = batcher.poke
    begun(batcher, goes, steps=0)
    backend.while_decoding = goes.generation.cancel
    run(batcher)
    assert backend.interruptions == 1
    assert (stays.text, stays.finish, goes.finish) == ("bcdefg", "length", "cancelled")


def test_who_stays_gets_on_however_often_others_come_and_leave() -> None:
    backend = CountingBackend(batch_size=16)
    batcher = Batcher(backend)
    stays = Client("a", max_tokens=10)
    begun(batcher, stays)
    batches = 0
    while stays.finish is None:
        goes = Client(chr(batches + 33) * 50)
        goes.generation.on_cancel = batcher.poke
        begun(batcher, goes, steps=0)
        backend.while_decoding = goes.generation.cancel
        deliver(batcher.step())
        batches += 1
        assert batches <= 20, "every batch was interrupted"
    assert stays.text == "bcdefghijk"
    assert backend.interruptions >= 8


def test_a_model_that_cannot_go_back_is_interrupted_only_if_nobody_stays() -> None:
    backend = CountingBackend(batch_size=16)
    backend.trims = False
    batcher = Batcher(backend)
    stays = Client("a", max_tokens=20)
    begun(batcher, stays)
    goes = Client("k" * 50)
    goes.generation.on_cancel = batcher.poke
    begun(batcher, goes, steps=0)
    backend.while_decoding = goes.generation.cancel
    deliver(batcher.step())
    assert backend.interruptions == 0
    stays.generation.on_cancel = batcher.poke
    backend.while_decoding = stays.generation.cancel
    run(batcher)
    assert backend.interruptions == 1
    after = Client("a", max_tokens=2)
    run(batcher, after)
    assert after.text == "bc"


def test_who_leaves_between_planning_and_decoding_is_not_read() -> None:
    clock = Clock()
    backend = CountingBackend()
    batcher = Batcher(backend, clock=clock)
    client = Client("a" * 20)
    begun(batcher, client, steps=0)
    # The first look at the clock is that for deadlines, the second comes after the batch was planned.
    looks = iter([None, client.generation.cancel])

    def leave() -> float:
        act = next(looks, None)
        if act is not None:
            act()
        return clock.now

    batcher._clock = leave
    run(batcher)
    assert backend.interruptions == 1
    assert client.finish == "cancelled"


def test_an_interruption_is_over_with_the_batch_it_was_for() -> None:
    backend = CountingBackend(batch_size=16)
    batcher = Batcher(backend)
    gone = Client("a" * 40)
    gone.generation.on_cancel = batcher.poke
    begun(batcher, gone)
    backend.while_decoding = gone.generation.cancel
    deliver(batcher.step())
    batcher.poke()
    other = Client("k", max_tokens=2)
    run(batcher, other)
    assert (other.text, backend.interruptions) == ("lm", 1)


def test_a_cancelled_scoring_says_nothing_and_frees_its_place() -> None:
    backend = CountingBackend(parallel=1)
    batcher = Batcher(backend)
    heard: list[object] = []
    scoring = Scoring("a" * 30, ("b",), heard.append)
    scoring.on_cancel = batcher.poke
    backend.while_decoding = scoring.cancel
    batcher.add_scoring(scoring)
    deliver(batcher.step())
    assert heard == []
    assert backend.interruptions == 1
    client = Client("a", max_tokens=2)
    run(batcher, client)
    assert client.text == "bc"
