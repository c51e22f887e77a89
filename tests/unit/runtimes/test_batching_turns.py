"""Applications share the places of a model: long answers are paused for those with fewer, and go on as if never."""

from __future__ import annotations

import random

import pytest

from garrison_agent.runtimes.llama.batching import TURN_TOKENS, Batcher
from tests.unit.runtimes.counting_backend import CountingBackend
from tests.unit.runtimes.text_clients import Client, Clock, deliver


def backend(**changes: int) -> CountingBackend:
    return CountingBackend(**{"parallel": 2, "context_length": 1000, "batch_size": 64, **changes})


def long(letter: str, app: str, tokens: int = 600) -> Client:
    return Client(letter, app=app, max_tokens=tokens, ignore_end=True)


def counted(letter: str, tokens: int) -> str:
    """Return the only right answer."""
    token, text = ord(letter), ""
    for _ in range(tokens):
        token = 0 if token == ord("z") else token + 1
        text += chr(token)
    return text


def add(batcher: Batcher, *clients: Client) -> None:
    deliver([batcher.add(client.generation) for client in clients])


def steps(batcher: Batcher, until: Client | None = None) -> int:
    for count in range(10_000):
        if until.finish is not None if until is not None else not batcher.busy:
            return count
        deliver(batcher.step())
    raise AssertionError("it never comes to an end")


@pytest.mark.parametrize("trims", [True, False])
def test_an_application_that_holds_all_places_gives_one_to_another(trims: bool) -> None:
    model = backend()
    model.trims = trims
    batcher = Batcher(model)
    greedy = [long(letter, "greedy") for letter in "aku"]
    add(batcher, *greedy)
    for _ in range(10):
        deliver(batcher.step())
    quick = Client("x", app="quick", max_tokens=2)
    add(batcher, quick)
    assert steps(batcher, quick) <= TURN_TOKENS
    assert quick.text == "yz"
    assert [client.finish for client in greedy] == [None] * 3
    assert not greedy[2].text  # the other application was served before it
    steps(batcher)
    assert [client.text for client in greedy] == [counted(letter, 600) for letter in "aku"]
    assert [client.finish for client in greedy] == ["length"] * 3
    assert [client.generation.completion_tokens for client in greedy] == [600] * 3
    assert model.samplers_open == 0


def test_the_place_is_for_the_application_with_fewest_whoever_waits_longer() -> None:
    batcher = Batcher(backend(parallel=3))
    add(batcher, long("a", "greedy"), long("k", "greedy"), long("u", "modest"))
    more, quick = long("b", "modest"), Client("x", app="quick", max_tokens=2)
    deliver(batcher.step())
    add(batcher, more, quick)
    steps(batcher, quick)
    assert (quick.text, more.text) == ("yz", "")


def test_one_application_never_pauses_its_own() -> None:
    model = backend()
    batcher = Batcher(model)
    clients = [long(letter, "one") for letter in "aku"]
    add(batcher, *clients)
    while batcher.busy:
        deliver(batcher.step())
        assert clients[2].text == "" or None not in (clients[0].finish, clients[1].finish)
    assert len(model.batches) == 1200  # the third waits for the first two, which are never read again


def test_with_more_applications_than_places_they_take_turns() -> None:
    model = backend(parallel=1)
    batcher = Batcher(model)
    clients = [long(letter, app=letter) for letter in "aku"]
    add(batcher, *clients)
    most = 0
    while batcher.busy:
        deliver(batcher.step())
        running = [len(client.text) for client in clients if client.finish is None]
        most = max(most, max(running, default=0) - min(running, default=0))
    assert most == TURN_TOKENS
    assert [client.text for client in clients] == [counted(letter, 600) for letter in "aku"]
    # What was paused is taken over, not read again: of each turn but the first, one token is read for its logits.
    assert model.read <= 3 * 600 + 3 * 600 // TURN_TOKENS + 1


def test_equal_shares_are_left_alone() -> None:
    model = backend()
    batcher = Batcher(model)
    add(batcher, long("a", "one"), long("k", "two"))
    steps_before = 2 * TURN_TOKENS
    for _ in range(steps_before):
        deliver(batcher.step())
    add(batcher, long("b", "one", 5))
    for _ in range(50):
        deliver(batcher.step())
    assert (batcher.active, batcher.queued) == (2, 1)


@pytest.mark.parametrize("end", ["cancelled", "too late"])
def test_a_paused_answer_ends_when_nobody_wants_it(end: str) -> None:
    model, clock = backend(parallel=1), Clock()
    batcher = Batcher(model, clock=clock)
    first, second = long("a", "one"), long("k", "two")
    first.generation.deadline_s = clock.now + 10
    add(batcher, first, second)
    while not second.text:
        deliver(batcher.step())
    assert (batcher.active, batcher.queued) == (1, 1)
    if end == "cancelled":
        first.generation.cancel()
    else:
        clock.pass_by(11)
    deliver(batcher.step())
    assert (first.finish, first.code) == (
        ("cancelled", None) if end == "cancelled" else ("error", "inference.deadline_exceeded")
    )
    assert len(first.text) == TURN_TOKENS
    steps(batcher)
    assert second.text == counted("k", 600)
    assert model.samplers_open == 0


def test_what_a_prompt_had_in_common_is_told_as_of_its_beginning() -> None:
    batcher = Batcher(backend(parallel=1))
    first, second = long("a", "one"), long("k", "two")
    add(batcher, first, second)
    steps(batcher)
    assert [client.generation.cached_tokens for client in (first, second)] == [0, 0]


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_answer_is_right_however_they_are_paused(seed: int, trims: bool) -> None:
    chance = random.Random(seed)
    model = backend(parallel=chance.randint(1, 4))
    model.trims = trims
    batcher = Batcher(model, store_bytes=chance.choice((0, 20_000, 1 << 20)))
    clients = []
    for number in range(20):
        letter, tokens = chance.choice("abcdefgh"), chance.choice((1, 50, 300, 700))
        client = long(letter, f"app {number % chance.randint(1, 5)}", tokens)
        clients.append((client, letter, tokens))
        add(batcher, client)
        for _ in range(chance.randint(0, 200)):
            deliver(batcher.step())
        if chance.random() < 0.1:
            chance.choice(clients)[0].generation.cancel()
    steps(batcher)
    for client, letter, tokens in clients:
        right = counted(letter, tokens)
        assert client.text == right if client.finish == "length" else right.startswith(client.text)
    assert (model.samplers_open, batcher.active, batcher.queued) == (0, 0, 0)
