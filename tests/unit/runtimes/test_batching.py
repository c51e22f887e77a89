from __future__ import annotations

import math
from typing import Any

import pytest

from garrison_agent.runtimes.llama.batching import MAX_WAITING, MAX_WAITING_APP, Batcher, Scoring
from garrison_protocol.errors import GarrisonError, InvalidError
from tests.unit.runtimes.counting_backend import CountingBackend
from tests.unit.runtimes.text_clients import Client, Clock, deliver, run


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


def test_beside_running_answers_a_part_of_a_prompt_takes_only_so_long() -> None:
    clock = Clock()
    backend = CountingBackend(parallel=2, context_length=4000, batch_size=512)
    batcher = Batcher(backend, clock=clock)

    def parts(*clients: Client) -> list[int]:
        deliver([batcher.add(client.generation) for client in clients])
        before = len(backend.batches)
        while any(client.generation.first_token_at is None for client in clients):
            deliver(batcher.step())
        return [len(batch) for batch in backend.batches[before:]]

    backend.row_takes = lambda: clock.pass_by(0.002)

    alone = Client("a" * 1500, max_tokens=1)
    assert parts(alone) == [8, 500, 500, 492]  # the first one tells what a row costs
    early = Client("k", max_tokens=14, ignore_end=True)
    parts(early)
    beside = Client("b" * 100, max_tokens=1)
    assert parts(beside) == [51, 51]
    assert early.text[:3] == "lmn"


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
    backend.trims = False
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


def test_a_full_line_refuses_its_application_and_says_so() -> None:
    batcher = Batcher(CountingBackend(parallel=1))
    clients = [Client("a", app="greedy", max_tokens=1) for _ in range(MAX_WAITING_APP + 1)]
    deliver([batcher.add(client.generation) for client in clients])
    assert clients[-1].code == "inference.queue_full"
    assert clients[-1].generation.error is not None
    assert clients[-1].generation.error.retryable
    other = Client("a", app="modest")
    deliver([batcher.add(other.generation)])
    assert other.finish is None


def test_a_full_queue_refuses_everybody() -> None:
    batcher = Batcher(CountingBackend(parallel=1))
    clients = [Client("a", app=str(number % 8), max_tokens=1) for number in range(MAX_WAITING + 1)]
    deliver([batcher.add(client.generation) for client in clients])
    assert [client.code for client in clients] == [None] * MAX_WAITING + ["inference.queue_full"]


def test_applications_are_served_in_turn() -> None:
    backend = CountingBackend(parallel=1)
    many = [Client(letter, app="many", max_tokens=1) for letter in "abc"]
    few = Client("x", app="few", max_tokens=1)
    run(Batcher(backend), *many, few)
    assert [chr(batch[0].token) for batch in backend.batches] == ["a", "x", "b", "c"]


def test_a_prompt_may_be_tokens() -> None:
    client = Client(tuple(b"abc"), max_tokens=2)
    run(Batcher(CountingBackend()), client)
    assert client.text == "de"


@pytest.mark.parametrize("tokens", [(97, 256), (-1, 97)])
def test_a_token_that_the_model_does_not_have_is_refused(tokens: tuple[int, ...]) -> None:
    batcher = Batcher(CountingBackend())
    prompt, bias = Client(tokens), Client("a", logit_bias=tuple((token, 1.0) for token in tokens))
    run(batcher, prompt, bias)
    assert prompt.code == bias.code == "inference.token_unknown"


def test_a_grammar_that_the_engine_cannot_use_is_refused_before_the_answer_begins() -> None:
    backend = CountingBackend()
    client = Client("a", grammar="")
    run(Batcher(backend), client)
    assert client.code == "inference.grammar_invalid"
    assert backend.batches == []


def test_an_answer_that_its_grammar_lets_go_no_further_ends() -> None:
    backend = CountingBackend()
    client = Client("a", grammar="bcd")
    run(Batcher(backend), client)
    assert (client.text, client.finish) == ("bcd", "stop")
    assert backend.samplers_open == 0


def test_an_answer_whose_sampling_fails_ends_alone() -> None:
    backend = CountingBackend()
    batcher = Batcher(backend)
    failing, other = Client("a", max_tokens=3), Client("k", max_tokens=3)
    deliver([batcher.add(failing.generation)])
    backend.sampling_fails = InvalidError("inference.grammar_invalid", "too ambiguous")
    deliver(batcher.step())
    backend.sampling_fails = None
    run(batcher, other)
    assert failing.code == "inference.grammar_invalid"
    assert other.text == "lmn"


def test_a_control_token_is_shown_only_where_it_is_part_of_what_was_asked_for() -> None:
    def text(**options: Any) -> str:
        backend = CountingBackend()
        backend.control = {ord("c"): b"<tool>"}
        client = Client("a", max_tokens=3, **options)
        run(Batcher(backend), client)
        return client.text

    assert text() == "bd"
    assert text(grammar="bcd") == "b<tool>d"
    assert text(grammar="bcd", grammar_triggers=("<tool>",)) == "b<tool>d"
    assert text(grammar="bcd", grammar_triggers=("{",)) == "bd"


def test_log_probabilities_come_with_their_text() -> None:
    client = Client("a", max_tokens=3, top_logprobs=2)
    run(Batcher(CountingBackend()), client)
    assert [(delta.text, [one.piece for one in delta.logprobs]) for delta in client.deltas[1:]] == [
        ("b", [b"b"]),
        ("c", [b"c"]),
        ("d", [b"d"]),
    ]
    first = client.deltas[1].logprobs[0]
    assert first.logprob == -0.5
    assert first.top == ((b"b", -0.5), (b"c", -5.0))


def test_without_being_asked_for_there_are_none() -> None:
    client = Client("a", max_tokens=3)
    run(Batcher(CountingBackend()), client)
    assert {delta.logprobs for delta in client.deltas} == {()}


def test_log_probabilities_of_a_stop_string_do_not_come() -> None:
    client = Client("a", stop=("de",), top_logprobs=0)
    run(Batcher(CountingBackend()), client)
    assert client.text == "bc"
    assert client.pieces == b"bc"


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
