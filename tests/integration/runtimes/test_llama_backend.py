"""The real backend does what the batcher relies on, and the counting one of the unit tests does the same."""

from __future__ import annotations

import math
import threading
import tracemalloc
from collections.abc import Iterator, Sequence

import pytest

from garrison_agent.runtimes.llama.backend import Backend, InterruptedDecodeError, Row
from garrison_agent.runtimes.llama.generation import Options
from garrison_agent.runtimes.llama.native_backend import LlamaBackend
from garrison_agent.runtimes.llama.settings import LlamaSettings
from garrison_protocol.errors import InvalidError
from tests.integration.runtimes.workers import smollm2
from tests.unit.runtimes.counting_backend import CountingBackend

pytestmark = pytest.mark.integration

TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"


@pytest.fixture(scope="module")
def smol() -> LlamaBackend:
    return LlamaBackend(str(smollm2()), threads=1, context_length=512, parallel=3)


@pytest.fixture(params=["counting", "llama"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen: Backend
    if request.param == "counting":
        chosen = CountingBackend(parallel=3, context_length=512, batch_size=512)
    else:
        chosen = request.getfixturevalue("smol")
    yield chosen
    chosen.interrupt(False)
    for sequence in range(chosen.parallel):
        assert chosen.forget(sequence, 0)


def read(backend: Backend, tokens: Sequence[int], sequence: int, start: int = 0) -> int:
    """Read ``tokens[start:]`` and return the token that most likely follows."""
    last = len(tokens) - 1
    backend.decode([Row(tokens[at], at, sequence, at == last) for at in range(start, len(tokens))])
    sampler = backend.sampler(Options(temperature=0), tokens)
    token = sampler.sample(last - start)
    sampler.close()
    assert token is not None
    return token


def test_a_shared_beginning_is_as_good_as_a_read_one(backend: Backend) -> None:
    tokens = backend.tokenize(TEXT)
    alone = read(backend, tokens, 0)
    backend.share(0, 1, len(tokens) - 1)
    assert read(backend, tokens, 1, len(tokens) - 1) == alone
    assert backend.forget(0, 0)
    assert backend.forget(1, len(tokens) - 1)
    assert read(backend, tokens, 1, len(tokens) - 1) == alone


def test_sequences_that_share_a_beginning_go_their_own_ways(backend: Backend) -> None:
    tokens = backend.tokenize(TEXT)
    alone = read(backend, tokens, 0)
    backend.share(0, 1, len(tokens) - 4)
    other = [*tokens[:-4], *backend.tokenize("1, 2, 3, 4,")]
    read(backend, other, 1, len(tokens) - 4)
    assert backend.forget(0, len(tokens) - 1)
    assert read(backend, tokens, 0, len(tokens) - 1) == alone


def test_a_saved_sequence_comes_back_in_another_one(backend: Backend) -> None:
    tokens = backend.tokenize(TEXT)
    alone = read(backend, tokens, 0)
    saved = backend.save(0, 1 << 30)
    assert saved is not None
    assert backend.save(0, len(saved) - 1) is None
    assert backend.forget(0, 0)
    assert backend.restore(2, saved)
    assert backend.forget(2, len(tokens) - 1)
    assert read(backend, tokens, 2, len(tokens) - 1) == alone


def test_of_a_shared_sequence_a_whole_copy_is_saved(backend: Backend) -> None:
    tokens = backend.tokenize(TEXT)
    alone = read(backend, tokens, 0)
    backend.share(0, 1, len(tokens) - 1)
    saved = backend.save(1, 1 << 30)
    assert saved is not None
    assert backend.forget(0, 0)
    assert backend.forget(1, 0)
    assert backend.restore(0, saved)
    assert read(backend, tokens, 0, len(tokens) - 1) == alone


def test_of_an_interrupted_batch_nothing_is_kept(backend: Backend) -> None:
    tokens = backend.tokenize(TEXT)
    alone = read(backend, tokens, 0)
    assert backend.forget(0, 4)
    backend.interrupt(True)
    with pytest.raises(InterruptedDecodeError):
        read(backend, tokens, 0, 4)
    backend.interrupt(False)
    assert read(backend, tokens, 0, 4) == alone


def test_a_decode_call_is_interrupted_from_another_thread(smol: LlamaBackend) -> None:
    tokens = (smol.tokenize(TEXT) * 40)[:500]
    timer = threading.Timer(0.05, smol.interrupt, [True])
    timer.start()
    with pytest.raises(InterruptedDecodeError):
        smol.decode([Row(token, at, 0, False) for at, token in enumerate(tokens)])
    timer.join()
    smol.interrupt(False)
    assert read(smol, tokens[:20], 0) >= 0
    smol.forget(0, 0)


def test_a_copy_that_is_no_copy_is_refused(smol: LlamaBackend) -> None:
    assert not smol.restore(0, b"nonsense" * 100)
    tokens = smol.tokenize(TEXT)
    assert read(smol, tokens, 0) >= 0
    smol.forget(0, 0)


def test_log_probabilities_are_those_of_the_model(smol: LlamaBackend) -> None:
    tokens = smol.tokenize(TEXT)
    likeliest = read(smol, tokens, 0)
    row = len(tokens) - 1
    told = smol.token_logprob(row, likeliest, 20)
    assert told.piece == smol.piece(likeliest)
    assert told.logprob == pytest.approx(smol.log_probability(row, likeliest))
    assert told.top[0] == (told.piece, told.logprob)
    values = [logprob for _, logprob in told.top]
    assert values == sorted(values, reverse=True)
    assert len(values) == 20
    assert smol.token_logprob(row, likeliest, 0).top == ()
    everything = smol.token_logprob(row, likeliest, smol.vocabulary).top
    assert sum(math.exp(logprob) for _, logprob in everything) == pytest.approx(1.0, abs=1e-6)
    smol.forget(0, 0)


def test_settings_reach_llama_cpp() -> None:
    settings = LlamaSettings(flash_attention=True, kv_cache_type="q8_0", batch_size=64)
    small = LlamaBackend(str(smollm2()), threads=1, context_length=256, parallel=2, settings=settings)
    assert small.batch_size == 64
    tokens = small.tokenize(TEXT)
    read(small, tokens, 0)
    whole = LlamaBackend(str(smollm2()), threads=1, context_length=256, parallel=2)
    read(whole, tokens, 0)
    saved, unsaved = small.save(0, 1 << 30), whole.save(0, 1 << 30)
    assert saved is not None
    assert unsaved is not None
    assert len(saved) < 0.6 * len(unsaved)


def test_more_sequences_than_llama_cpp_has_are_a_failed_load() -> None:
    with pytest.raises(InvalidError) as caught:
        LlamaBackend(str(smollm2()), threads=1, context_length=16, parallel=257)
    assert caught.value.code == "model.load_failed"


def test_requests_that_wait_with_a_grammar_hold_no_room_for_a_whole_vocabulary_each(smol: LlamaBackend) -> None:
    options = Options(grammar='root ::= "yes" | "no"')
    tokens = smol.tokenize(TEXT)
    tracemalloc.start()
    try:
        samplers = [smol.sampler(options, tokens) for _ in range(8)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for sampler in samplers:
        sampler.close()
    assert held < smol.vocabulary


def test_answers_with_grammars_of_their_own_take_turns(smol: LlamaBackend) -> None:
    tokens = smol.tokenize(TEXT)
    smol.decode([Row(token, at, 0, at == len(tokens) - 1) for at, token in enumerate(tokens)])
    samplers = [smol.sampler(Options(temperature=0, grammar=f'root ::= "{word}"'), tokens) for word in ("7", "Z", "7")]
    try:
        chosen = [sampler.sample(len(tokens) - 1) for sampler in samplers]
    finally:
        for sampler in samplers:
            sampler.close()
        assert smol.forget(0, 0)
    assert [smol.piece(token) for token in chosen if token is not None] == [b"7", b"Z", b"7"]
