from __future__ import annotations

import math
from typing import Any

import pytest

from garrison_agent.runtimes.batching import MAX_WAITING, Batcher, Delta, Generation, Options, Output, Scoring
from garrison_protocol.errors import GarrisonError, InvalidError
from tests.unit.runtimes.counting_backend import CountingBackend


class Client:
    """Collects one answer."""

    def __init__(self, prompt: str, **options: Any) -> None:
        self.text = ""
        self.finish: str | None = None
        self.deltas: list[Delta] = []
        self.generation = Generation(prompt, Options(**options), self.hear)

    def hear(self, delta: Delta) -> None:
        assert self.finish is None, "nothing comes after the end"
        self.deltas.append(delta)
        self.text += delta.text
        self.finish = delta.finish


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


def test_an_answer_ends_at_the_models_own_end() -> None:
    client = Client("w")
    run(Batcher(CountingBackend()), client)
    assert (client.text, client.finish) == ("xyz", "stop")
    assert (client.generation.prompt_tokens, client.generation.completion_tokens) == (1, 3)


def test_an_answer_ends_at_its_limit() -> None:
    client = Client("a", max_tokens=4)
    run(Batcher(CountingBackend()), client)
    assert (client.text, client.finish) == ("bcde", "length")


def test_an_answer_ends_where_the_context_is_full() -> None:
    client = Client("a" * 60, max_tokens=50)
    run(Batcher(CountingBackend(context_length=64)), client)
    assert (client.text, client.finish) == ("bcde", "length")


def test_a_stop_string_ends_the_answer_and_is_not_shown() -> None:
    client = Client("a", stop=("ef",))
    run(Batcher(CountingBackend()), client)
    assert (client.text, client.finish) == ("bcd", "stop")


def test_more_requests_than_sequences_all_get_their_own_answer() -> None:
    clients = [Client(letter, max_tokens=3) for letter in "aeimq"]
    backend = CountingBackend(parallel=2)
    run(Batcher(backend), *clients)
    assert [client.text for client in clients] == ["bcd", "fgh", "jkl", "nop", "rst"]
    assert backend.samplers_open == 0


def test_running_answers_share_each_batch() -> None:
    backend = CountingBackend(parallel=2)
    run(Batcher(backend), Client("a", max_tokens=5), Client("k", max_tokens=5))
    assert [len(batch) for batch in backend.batches] == [2, 2, 2, 2, 2]


def test_a_long_prompt_is_read_in_parts_while_another_answer_goes_on() -> None:
    backend = CountingBackend(parallel=2, batch_size=8)
    batcher = Batcher(backend)
    early = Client("a", max_tokens=20)
    deliver([batcher.add(early.generation)])
    deliver(batcher.step())
    late = Client("m" * 30, max_tokens=1)
    deliver([batcher.add(late.generation)])
    before = len(early.text)
    while late.finish is None:
        deliver(batcher.step())
    assert len(early.text) - before >= 30 // 8
    assert late.text == "n"


def test_a_prompt_cancelled_halfway_is_read_no_further() -> None:
    backend = CountingBackend(batch_size=8)
    batcher = Batcher(backend)
    client = Client("a" * 40)
    deliver([batcher.add(client.generation)])
    deliver(batcher.step())
    client.generation.cancelled = True
    deliver(batcher.step())
    assert client.finish == "cancelled"
    assert len(backend.batches) == 1
    assert not batcher.busy
    assert backend.samplers_open == 0


def test_cancelling_ends_a_running_and_a_waiting_request() -> None:
    batcher = Batcher(CountingBackend(parallel=1))
    running, waiting = Client("a"), Client("b")
    deliver([batcher.add(running.generation), batcher.add(waiting.generation)])
    deliver(batcher.step())
    assert (batcher.active, batcher.queued) == (1, 1)
    running.generation.cancelled = waiting.generation.cancelled = True
    deliver(batcher.step())
    assert (running.finish, waiting.finish) == ("cancelled", "cancelled")
    assert (batcher.active, batcher.queued) == (0, 0)


def test_the_next_turn_reads_only_what_is_new() -> None:
    backend = CountingBackend()
    batcher = Batcher(backend)
    run(batcher, Client("hello ", max_tokens=3))
    read = sum(map(len, backend.batches))
    second = Client("hello there", max_tokens=1)
    run(batcher, second)
    assert second.generation.cached_tokens == len("hello ")
    assert sum(map(len, backend.batches)) - read == len("there")
    assert second.text == "f"


def test_the_same_prompt_again_reads_one_token() -> None:
    batcher = Batcher(CountingBackend())
    first, second = Client("abc", max_tokens=2), Client("abc", max_tokens=2)
    run(batcher, first)
    run(batcher, second)
    assert second.generation.cached_tokens == 2
    assert first.text == second.text == "de"


def test_a_model_that_cannot_forget_a_part_starts_over() -> None:
    backend = CountingBackend(parallel=1)
    backend.only_whole = True
    batcher = Batcher(backend)
    run(batcher, Client("abcd", max_tokens=1))
    second = Client("abxy", max_tokens=1)
    run(batcher, second)
    assert second.generation.cached_tokens == 0
    assert second.text == "z"


def test_what_finished_answers_leave_behind_is_bounded() -> None:
    backend = CountingBackend(parallel=4, context_length=16)
    batcher = Batcher(backend)
    run(batcher, *(Client(letter * 12, max_tokens=1) for letter in "abcd"))
    run(batcher, Client("zz"))
    idle = sum(len(held) for held in backend.held.values() if held and held[0] != ord("z"))
    assert idle <= 16


def test_a_prompt_beyond_the_context_is_refused_with_its_size() -> None:
    client = Client("a" * 64)
    run(Batcher(CountingBackend(context_length=64)), client)
    error = client.generation.error
    assert client.finish == "error"
    assert isinstance(error, InvalidError)
    assert error.code == "inference.context_length_exceeded"
    assert error.fields["prompt_tokens"] == 64


def test_an_empty_prompt_is_refused() -> None:
    client = Client("")
    run(Batcher(CountingBackend()), client)
    assert client.generation.error is not None
    assert client.generation.error.code == "inference.prompt_empty"


def test_a_full_queue_refuses_and_says_so() -> None:
    batcher = Batcher(CountingBackend(parallel=1))
    clients = [Client("a", max_tokens=1) for _ in range(MAX_WAITING + 1)]
    deliver([batcher.add(client.generation) for client in clients])
    assert clients[-1].generation.error is not None
    assert clients[-1].generation.error.code == "inference.queue_full"
    assert clients[-1].generation.error.retryable


def test_a_failed_batch_ends_its_answers_and_the_next_request_works() -> None:
    backend = CountingBackend()
    batcher = Batcher(backend)
    lost = Client("a")
    deliver([batcher.add(lost.generation)])
    backend.fail_next = True
    deliver(batcher.step())
    assert lost.finish == "error"
    assert lost.generation.error is not None
    assert lost.generation.error.code == "inference.decode_failed"
    after = Client("a", max_tokens=2)
    run(batcher, after)
    assert after.text == "bc"


def test_ignore_end_goes_on_to_the_limit() -> None:
    client = Client("y", max_tokens=4, ignore_end=True)
    run(Batcher(CountingBackend()), client)
    assert (client.generation.completion_tokens, client.finish) == (4, "length")


def score(batcher: Batcher, prompt: str, *choices: str) -> list[float] | GarrisonError:
    results: list[list[float] | GarrisonError] = []
    batcher.add_scoring(Scoring(prompt, choices, results.append))
    for _ in range(50):
        if results:
            return results[0]
        deliver(batcher.step())
    raise AssertionError("no score came")


@pytest.mark.parametrize("prompt", ["a", "xxa", "x" * 20 + "a"])
def test_choices_are_scored_by_their_mean_per_token(prompt: str) -> None:
    means = score(Batcher(CountingBackend()), prompt, "bc", "bx", "zz", "bcdefghijk")
    assert means == pytest.approx([-0.5, -2.75, -5.0, -0.5])


def test_a_choice_without_a_probability_is_nan() -> None:
    means = score(Batcher(CountingBackend()), "a", "b", "?")
    assert isinstance(means, list)
    assert means[0] == -0.5
    assert math.isnan(means[1])


def test_scoring_waits_for_a_free_sequence_and_leaves_answers_alone() -> None:
    batcher = Batcher(CountingBackend(parallel=1))
    client = Client("a", max_tokens=5)
    deliver([batcher.add(client.generation)])
    deliver(batcher.step())
    assert score(batcher, "a", "b") == [-0.5]
    assert client.text == "bcdef"


def test_an_empty_choice_is_refused() -> None:
    error = score(Batcher(CountingBackend()), "a", "")
    assert isinstance(error, InvalidError)
    assert error.code == "inference.choice_empty"


def test_a_failed_batch_fails_the_scoring() -> None:
    backend = CountingBackend()
    backend.fail_next = True
    error = score(Batcher(backend), "a", "b")
    assert isinstance(error, GarrisonError)
    assert error.code == "inference.decode_failed"
