"""What is known is not read again: from idle and running sequences, from prompts being read, and from the store."""

from __future__ import annotations

import random

import pytest

from garrison_agent.runtimes.llama.batching import WORTH_WAITING, Batcher
from garrison_agent.runtimes.llama.pace import ENOUGH_ROWS
from tests.unit.runtimes.counting_backend import BYTES_PER_TOKEN, CountingBackend
from tests.unit.runtimes.text_clients import Client, deliver, run

SYSTEM = "s" * 100


def backend(**changes: int) -> CountingBackend:
    return CountingBackend(**{"parallel": 4, "context_length": 400, "batch_size": 32, **changes})


def test_one_prompt_for_many_answers_is_read_once() -> None:
    model = backend()
    clients = [Client(SYSTEM, max_tokens=1, temperature=1, seed=seed) for seed in range(4)]
    run(Batcher(model), *clients)
    assert [client.text for client in clients] == ["t"] * 4
    assert model.read == len(SYSTEM) + 3  # each reads the last token itself, for its logits
    assert [client.generation.cached_tokens for client in clients] == [0, 99, 99, 99]


def test_what_a_running_answer_has_read_is_shared() -> None:
    model = backend()
    batcher = Batcher(model)
    first = Client(SYSTEM + "a", max_tokens=20)
    deliver([batcher.add(first.generation)])
    while not first.text:
        deliver(batcher.step())
    second = Client(SYSTEM + "k", max_tokens=2)
    run(batcher, second)
    assert second.generation.cached_tokens == len(SYSTEM)
    assert (first.text[:3], second.text) == ("bcd", "lm")


def test_a_prompt_waits_only_for_a_long_common_part() -> None:
    model = backend()
    short = "s" * (WORTH_WAITING - 1)
    run(Batcher(model), Client(short + "a", max_tokens=1), Client(short + "k", max_tokens=1))
    assert model.read == 2 * WORTH_WAITING
    model = backend()
    long = "s" * WORTH_WAITING
    run(Batcher(model), Client(long + "a", max_tokens=1), Client(long + "k", max_tokens=1))
    assert model.read == WORTH_WAITING + 2


def test_who_waited_for_a_prompt_that_is_given_up_reads_the_rest() -> None:
    model = backend()
    batcher = Batcher(model)
    first, second = Client(SYSTEM + "a"), Client(SYSTEM + "k", max_tokens=2)
    deliver([batcher.add(first.generation), batcher.add(second.generation)])
    deliver(batcher.step())
    first.generation.cancel()
    run(batcher)
    assert second.text == "lm"
    assert second.generation.cached_tokens == ENOUGH_ROWS
    assert model.read == len(SYSTEM) + 1 + 1  # and the "l" that was sampled


def test_nobody_waits_for_a_model_that_cannot_share() -> None:
    model = backend()
    model.trims = False
    clients = [Client(SYSTEM, max_tokens=1) for _ in range(2)]
    run(Batcher(model), *clients)
    assert model.read == 2 * len(SYSTEM)
    assert [client.text for client in clients] == ["t", "t"]


def test_a_shared_beginning_leaves_the_conversation_it_came_from_alone() -> None:
    model = backend()
    batcher = Batcher(model)
    one, two = SYSTEM + "a" * 100, SYSTEM + "k" * 100
    run(batcher, Client(one, max_tokens=1))
    run(batcher, Client(two, max_tokens=1))
    again = Client(one + "b", max_tokens=1)
    run(batcher, again)
    assert again.generation.cached_tokens == len(one)


@pytest.mark.parametrize("parallel", [1, 2])
def test_conversations_taking_turns_keep_theirs(parallel: int) -> None:
    """With one sequence it is the store that keeps the other one."""
    model = backend(parallel=parallel)
    batcher = Batcher(model)
    talks = {"a": "a" * 100, "k": "k" * 100}
    cached = []
    for _ in range(3):
        for letter, said in list(talks.items()):
            client = Client(said, max_tokens=2)
            run(batcher, client)
            cached.append(client.generation.cached_tokens)
            talks[letter] = said + client.text + letter * 3
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) >= 100
    assert model.saves == (0 if parallel == 2 else 5)


def test_idle_sequences_that_are_too_much_to_attend_to_go_into_the_store() -> None:
    model = backend(context_length=150)
    batcher = Batcher(model)
    for letter in "abc":
        run(batcher, Client(letter * 100, max_tokens=1))
    assert sum(map(len, model.held.values())) < 300
    again = Client("a" * 100, max_tokens=1)
    run(batcher, again)
    assert (again.generation.cached_tokens, model.restores) == (99, 1)


def test_more_conversations_than_the_store_holds_lose_the_oldest() -> None:
    def cached(store_tokens: int) -> list[int]:
        model = backend(parallel=1)
        batcher = Batcher(model, store_bytes=store_tokens * (BYTES_PER_TOKEN + 8))
        counts = []
        for letter in "abc" + "abc":
            client = Client(letter * 100, max_tokens=1)
            run(batcher, client)
            counts.append(client.generation.cached_tokens)
        return counts[3:]

    assert cached(1000) == [99, 99, 99]
    assert cached(150) == [0, 0, 0]
    assert cached(0) == [0, 0, 0]


def test_a_copy_comes_back_although_what_it_replaces_takes_its_place_in_the_store() -> None:
    model = backend(parallel=1)
    batcher = Batcher(model, store_bytes=150 * (BYTES_PER_TOKEN + 8))
    run(batcher, Client("a" * 100, max_tokens=1))
    run(batcher, Client("k" * 100, max_tokens=1))
    again = Client("a" * 101, max_tokens=1)
    run(batcher, again)
    assert (again.generation.cached_tokens, again.text, model.restores) == (100, "b", 1)


def test_a_copy_that_cannot_be_brought_back_is_read_again() -> None:
    model = backend(parallel=1)
    batcher = Batcher(model)
    run(batcher, Client("a" * 100, max_tokens=1))
    run(batcher, Client("k" * 100, max_tokens=1))
    model.fail_restore = True
    again = Client("a" * 100, max_tokens=1)
    run(batcher, again)
    assert (again.generation.cached_tokens, again.text) == (0, "b")


def test_a_model_that_cannot_be_cut_gets_back_only_what_fits_whole() -> None:
    model = backend(parallel=1)
    model.trims = False
    batcher = Batcher(model)
    run(batcher, Client("a" * 100, max_tokens=1))
    run(batcher, Client("k" * 100, max_tokens=1))
    other = Client("a" * 90, max_tokens=1)
    run(batcher, other)
    assert (other.generation.cached_tokens, other.text, model.restores) == (0, "b", 0)
    on = Client("k" * 100 + "a", max_tokens=1)
    run(batcher, on)
    assert (on.generation.cached_tokens, on.text) == (100, "b")


def test_a_failed_batch_leaves_nothing_to_take_over() -> None:
    model = backend()
    batcher = Batcher(model)
    run(batcher, Client(SYSTEM, max_tokens=1))
    model.fail_next = True
    run(batcher, Client("x"))
    after = Client(SYSTEM, max_tokens=1)
    run(batcher, after)
    assert (after.generation.cached_tokens, after.text) == (0, "t")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("trims", [True, False])
def test_whatever_happens_every_answer_is_its_own_and_nothing_leaks(seed: int, trims: bool) -> None:
    """Random prompts with common beginnings, cancellations, interruptions, and failures, in a small memory."""
    dice = random.Random(seed)
    model = CountingBackend(parallel=3, context_length=160, batch_size=16)
    model.trims = trims
    batcher = Batcher(model, store_bytes=400 * BYTES_PER_TOKEN)
    beginnings = ["s" * 90, "s" * 40 + "t" * 30, "u" * 120, "v"]
    clients: list[Client] = []
    for _ in range(200):
        if dice.random() < 0.3:
            prompt = dice.choice(beginnings) + "".join(dice.choices("abk", k=dice.randrange(1, 30)))
            client = Client(prompt, app=dice.choice("xyz"), max_tokens=dice.randrange(1, 12))
            client.generation.on_cancel = batcher.poke
            clients.append(client)
            deliver([batcher.add(client.generation)])
        running = [client for client in clients if client.finish is None]
        if running and dice.random() < 0.2:
            victim = dice.choice(running)
            if dice.random() < 0.5:
                model.while_decoding = victim.generation.cancel
            else:
                victim.generation.cancel()
        model.fail_next = dice.random() < 0.01
        deliver(batcher.step())
    model.fail_next = False
    run(batcher)
    assert model.samplers_open == 0
    assert batcher.active == batcher.queued == 0
    assert model.interruptions > 0 or not trims
    for client in clients:
        last = str(client.generation.prompt)[-1]
        follows = "".join(map(chr, range(ord(last) + 1, 123)))
        assert client.finish in ("length", "cancelled", "error")
        assert follows.startswith(client.text)
        if client.finish == "length":
            assert len(client.text) == client.generation.options.max_tokens
