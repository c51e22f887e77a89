"""Answers of the real SmolLM2 through the batcher: grammars, biases, penalties, and what is not read twice."""

from __future__ import annotations

import json

import pytest

from garrison_agent.runtimes.llama.batching import Batcher
from garrison_agent.runtimes.llama.native_backend import LlamaBackend
from tests.integration.runtimes.workers import smollm2
from tests.unit.runtimes.text_clients import Client, deliver, run

pytestmark = pytest.mark.integration

FRANCE = "The capital of France is"
PERSON = r"""
root ::= "{" ws "\"name\":" ws name "," ws "\"age\":" ws [0-9]{1,2} ws "}"
name ::= "\"" [a-zA-Z ]{1,20} "\""
ws ::= [ \n]{0,2}
"""
TOOL = 'root ::= "<tool>" [0-9]{1,4} "</tool>"'
BIRDS = "Once upon a time there was a little bird who lived in a tall tree and sang to the moon. " * 4


@pytest.fixture(scope="module")
def smol() -> LlamaBackend:
    return LlamaBackend(str(smollm2()), threads=1, context_length=1024, parallel=4)


@pytest.fixture
def batcher(smol: LlamaBackend) -> Batcher:
    for sequence in range(smol.parallel):
        smol.forget(sequence, 0)
    return Batcher(smol)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_answer_under_a_grammar_is_a_text_of_it(batcher: Batcher, temperature: float, seed: int) -> None:
    client = Client("Somebody, as JSON: ", grammar=PERSON, temperature=temperature, seed=seed, max_tokens=100)
    run(batcher, client)
    assert client.finish == "stop"
    person = json.loads(client.text)
    assert set(person) == {"name", "age"}


def test_what_the_model_finds_unlikely_is_said_if_only_that_is_allowed(batcher: Batcher) -> None:
    client = Client(FRANCE, grammar='root ::= " Zürich 東京"', temperature=0)
    run(batcher, client)
    assert (client.text, client.finish) == (" Zürich 東京", "stop")


def test_log_probabilities_are_those_from_before_the_grammar_and_the_bias(batcher: Batcher, smol: LlamaBackend) -> None:
    paris = smol.tokenize(" Paris")[-1]
    free = Client(FRANCE, temperature=0, max_tokens=1, top_logprobs=2)
    held = Client(FRANCE, temperature=0, max_tokens=1, top_logprobs=2, grammar='root ::= " Rome" [a-z ]+')
    biased = Client(FRANCE, temperature=0, max_tokens=1, top_logprobs=2, logit_bias=((paris, -100.0),))
    for client in (free, held, biased):
        run(batcher, client)
    assert free.text == " Paris"
    assert " Rome".startswith(held.text)
    assert biased.text not in (" Paris", "")
    (first,) = free.deltas[-1].logprobs
    assert first.top[0] == (b" Paris", first.logprob)
    for client in (held, biased):
        (other,) = client.deltas[-1].logprobs
        assert other.top[0][0] == b" Paris"
        assert other.logprob < first.logprob


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "answer ::= [a-z]+",
        "root ::= root [a-z] | [a-z]",
        "root ::= elsewhere",
        "root ::= [a-z",
        "root ::= " + "(" * 5000 + "[a-z]" + ")" * 5000,
        "root ::= [a-z]+\n" + "#" * 200_000,
        "root ::= [\0]",
    ],
)
def test_a_grammar_that_llama_cpp_refuses_is_refused_and_printed_nowhere(
    batcher: Batcher, grammar: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client = Client(FRANCE, grammar=grammar)
    run(batcher, client)
    assert client.code == "inference.grammar_invalid"
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_the_longest_chain_of_rules_that_is_let_through_does_not_end_the_process(batcher: Batcher) -> None:
    count = 9000
    rules = [f"r{number:x}::=r{number + 1:x}" for number in range(count)]
    client = Client(FRANCE, grammar="\n".join(["root::=r0", *rules, f"r{count:x}::=[a-z]"]), max_tokens=3)
    run(batcher, client)
    assert client.finish == "stop" or client.code == "inference.grammar_invalid"


def test_a_grammar_that_no_token_can_go_on_with_ends_the_answer(batcher: Batcher) -> None:
    client = Client(FRANCE, grammar='root ::= "ab" <[999999]>', temperature=0)
    other = Client(FRANCE, temperature=0, max_tokens=2)
    run(batcher, client, other)
    assert (client.text, client.finish) == ("ab", "stop")
    assert other.text.startswith(" Paris")


def test_a_lazy_grammar_holds_from_its_trigger_on(batcher: Batcher) -> None:
    prompt = "Say: now <tool>abc</tool> Say: now <tool>abc</tool> Say:"
    free = Client(prompt, temperature=0, max_tokens=24)
    held = Client(prompt, temperature=0, max_tokens=24, grammar=TOOL, grammar_triggers=("<nothing>", "<tool>"))
    run(batcher, free, held)
    before, _, after = held.text.partition("<tool>")
    assert free.text.startswith(before + "<tool>a")
    assert after.removesuffix("</tool>").isdigit()
    assert held.finish == "stop"


RED = '["red", "red", "red", "red'
"""What the model wants to say next is one token: a quotation mark and a comma."""


def test_a_token_that_holds_a_trigger_and_something_wrong_is_not_said(batcher: Batcher) -> None:
    client = Client(RED, temperature=0, max_tokens=12, grammar='root ::= "\\"" [0-9] "!"', grammar_triggers=('"',))
    free = Client(RED, temperature=0, max_tokens=1, top_logprobs=0)
    run(batcher, free, client)
    assert free.pieces == b'",'
    assert (client.text[0], client.text[1].isdigit(), client.text[2:]) == ('"', True, "!")


def test_a_trigger_in_the_middle_of_a_token_counts_from_there(batcher: Batcher) -> None:
    client = Client(RED, temperature=0, max_tokens=12, grammar='root ::= "," [0-9] "!"', grammar_triggers=(",",))
    run(batcher, client)
    assert (client.text[:2], client.text[2].isdigit(), client.text[3:]) == ('",', True, "!")


def test_a_repeat_penalty_counts_the_prompt_too(batcher: Batcher) -> None:
    prompt = "red red red red red red red red"
    plain, penalised = (Client(prompt, temperature=0, max_tokens=4, repeat_penalty=penalty) for penalty in (1.0, 3.0))
    run(batcher, plain, penalised)
    assert plain.text == " red" * 4
    assert " red" not in penalised.text


def test_a_common_beginning_is_read_once(batcher: Batcher, smol: LlamaBackend) -> None:
    endings = ("The bird", "One night", "A cat", "But then")
    alone = []
    for ending in endings:
        client = Client(BIRDS + ending, temperature=0, max_tokens=4)
        run(Batcher(smol, store_bytes=0), client)
        for sequence in range(smol.parallel):
            smol.forget(sequence, 0)
        alone.append(client.text)
    clients = [Client(BIRDS + ending, temperature=0, max_tokens=4) for ending in endings]
    run(batcher, *clients)
    common = len(smol.tokenize(BIRDS))
    assert [client.generation.cached_tokens >= common - 2 for client in clients] == [False, True, True, True]
    # Cells in another order round differently; that four prompts all part at once would be no rounding.
    assert sum(client.text == text for client, text in zip(clients, alone, strict=True)) >= 3


def test_conversations_beyond_the_sequences_come_back_from_the_store(smol: LlamaBackend) -> None:
    for sequence in range(smol.parallel):
        smol.forget(sequence, 0)
    batcher = Batcher(smol)
    prompts = [f"Story number {number}. " + BIRDS for number in range(5)]
    first = [Client(prompt, temperature=0, max_tokens=3) for prompt in prompts]
    for client in first:
        run(batcher, client)
    again = [Client(prompt, temperature=0, max_tokens=3) for prompt in prompts]
    for client in again:
        run(batcher, client)
    assert all(client.generation.cached_tokens == client.generation.prompt_tokens - 1 for client in again)
    assert sum(one.text == other.text for one, other in zip(first, again, strict=True)) >= 4


def test_answers_go_on_while_a_long_prompt_is_read(batcher: Batcher) -> None:
    early = Client(FRANCE, temperature=0, max_tokens=500, ignore_end=True)
    deliver([batcher.add(early.generation)])
    while not early.text:
        deliver(batcher.step())
    late = Client(BIRDS * 2, temperature=0, max_tokens=1)
    deliver([batcher.add(late.generation)])
    before = early.generation.completion_tokens
    while late.finish is None:
        deliver(batcher.step())
    assert early.generation.completion_tokens - before >= late.generation.prompt_tokens // 128 > 0
    early.generation.cancel()
    run(batcher)


def test_an_answer_that_is_paused_keeps_to_its_grammar_and_its_samplers(batcher: Batcher, smol: LlamaBackend) -> None:
    greedy = [
        Client(f"{number}. Digits: ", app="greedy", grammar="root ::= [0-9]{200}", temperature=0.9, seed=number)
        for number in range(smol.parallel)
    ]
    deliver([batcher.add(client.generation) for client in greedy])
    while not all(client.text for client in greedy):
        deliver(batcher.step())
    quick = Client(FRANCE, app="quick", temperature=0, max_tokens=1)
    deliver([batcher.add(quick.generation)])
    while quick.finish is None:
        deliver(batcher.step())
    assert quick.text == " Paris"
    assert [client.finish for client in greedy] == [None] * smol.parallel
    run(batcher)
    assert [(len(client.text), client.text.isdecimal(), client.finish) for client in greedy] == [
        (200, True, "stop")
    ] * smol.parallel
