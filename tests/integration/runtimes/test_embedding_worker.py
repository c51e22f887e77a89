"""The embedding worker with SmolLM2: the official clients' words, and the vectors that llama-cpp-python makes."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import httpx
import httpx2
import llama_cpp
import numpy as np
import ollama
import openai
import pytest

from garrison_agent.runtimes.gate import run_gate
from garrison_agent.runtimes.llama.model import load_model
from garrison_protocol.manifest import ChoiceCase, Evaluation, SimilarityCase
from garrison_protocol.messages.desired import GateLimits
from tests.integration.runtimes.tiny_models import tiny_encoder
from tests.integration.runtimes.workers import WatchedWorker, eventually, llama_spec, smollm2

pytestmark = pytest.mark.integration

CAT, RUG, STOCKS = "The cat sat on the mat.", "A feline rests on a rug.", "Stock prices fell sharply today."
LONG = "one two three four five six seven eight nine ten " * 18
"""More than one piece of the backend, less than the context."""


@pytest.fixture(scope="module")
def worker(short_folder: Path) -> Iterator[WatchedWorker]:
    spec = llama_spec(
        smollm2(),
        short_folder / "embed.sock",
        context_length=600,
        settings={"embedding": True, "matryoshka": "64,128"},
    )
    with WatchedWorker(spec) as started:
        started.ready()
        yield started


@pytest.fixture
def client(worker: WatchedWorker) -> Iterator[openai.OpenAI]:
    transport = httpx2.HTTPTransport(uds=str(worker.spec.socket))
    with (
        httpx2.Client(transport=transport) as http,
        openai.OpenAI(base_url="http://worker/v1", api_key="none", http_client=http) as made,
    ):
        yield made


def vectors(worker: WatchedWorker, given: object, **more: Any) -> Any:
    answer = worker.post("/v1/embeddings", {"input": given, **more})
    return np.array([item["embedding"] for item in answer["data"]])


def test_the_vectors_are_those_of_llama_cpp_python(
    client: openai.OpenAI, worker: WatchedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(str(smollm2()))  # says nothing more on standard error
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False  # its AMX kernels crash (runtimes/llama/model.py)
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", lambda: params)
    reference = llama_cpp.Llama(
        str(smollm2()),
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
        n_ctx=512,  # it aborts with some sizes
        n_batch=512,
        n_ubatch=512,
        n_threads=1,
        verbose=False,
    )
    answer = client.embeddings.create(model="smollm2", input=[CAT, LONG, STOCKS])
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, text in zip(answer.data, (CAT, LONG, STOCKS), strict=True):
        want = np.array(reference.embed(text, normalize=True))
        got = np.array(item.embedding)
        assert got.shape == want.shape == (576,)
        assert float(got @ want) > 0.999, text[:20]
        assert float(np.linalg.norm(got)) == pytest.approx(1, abs=1e-5)
    reference.close()
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 190
    record = worker.record()
    assert (record.kind, record.ok, record.prompt_tokens) == ("embedding", True, answer.usage.prompt_tokens)


def test_an_input_means_the_same_alone_and_in_company(worker: WatchedWorker) -> None:
    together = vectors(worker, [CAT, RUG, STOCKS] * 20)
    assert together.shape == (60, 576)
    for index, text in enumerate((CAT, RUG, STOCKS)):
        alone = vectors(worker, text)[0]
        assert float(alone @ together[index]) > 0.999
        assert float(alone @ together[57 + index]) > 0.999
    assert together[0] @ together[1] > together[0] @ together[2]


def test_numbers_and_base64_say_the_same(worker: WatchedWorker) -> None:
    floats = vectors(worker, CAT)[0]
    (item,) = worker.post("/v1/embeddings", {"input": CAT, "encoding_format": "base64"})["data"]
    coded = struct.unpack("<576f", base64.b64decode(item["embedding"]))
    assert np.array_equal(np.array(coded, np.float32), floats.astype(np.float32))


def test_tokens_are_taken_as_they_are(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model="m", input=[1, 2, 3])
    two = client.embeddings.create(model="m", input=[[1, 2, 3], [4]])
    assert one.usage.prompt_tokens == 3
    assert two.usage.prompt_tokens == 4
    assert np.dot(one.data[0].embedding, two.data[0].embedding) > 0.999


def test_dimensions_only_where_the_manifest_says_so(worker: WatchedWorker) -> None:
    whole, cut = vectors(worker, CAT)[0], vectors(worker, CAT, dimensions=64)[0]
    assert cut.shape == (64,)
    assert cut == pytest.approx(whole[:64] / np.linalg.norm(whole[:64]), abs=1e-5)
    assert vectors(worker, CAT, dimensions=576).shape == (1, 576)
    for dimensions in (65, 577):
        status, answer = worker.call("POST", "/v1/embeddings", {"input": CAT, "dimensions": dimensions})
        assert (status, answer["error"]["param"]) == (400, "dimensions")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [CAT, ""]}, "invalid_value", "input"),
        ({"input": [[]]}, "invalid_value", "input"),
        ({"input": [1, "a"]}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": [49152]}, "prompt_unreadable", "input"),
        ({"input": [-1]}, "invalid_value", "input"),
        ({"input": [CAT, "word " * 700]}, "context_length_exceeded", "input"),
        ({"input": CAT, "encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"input": CAT, "dimensions": 0}, "invalid_value", "dimensions"),
        ({}, "invalid_value", "input"),
        (b"{", "invalid_json", None),
    ],
)
def test_errors_in_openais_shape(worker: WatchedWorker, body: object, code: str, param: str | None) -> None:
    status, answer = worker.call("POST", "/v1/embeddings", body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["code"] == code
    assert answer["error"]["param"] == param


def test_too_long_an_input_is_named_with_its_counts(worker: WatchedWorker) -> None:
    _, answer = worker.call("POST", "/v1/embeddings", {"input": [CAT, "word " * 700]})
    assert "input 1 has 70" in answer["error"]["message"]
    assert "600" in answer["error"]["message"]


def test_a_long_request_for_text_is_refused_in_words(worker: WatchedWorker) -> None:
    status, answer = worker.call_once("/v1/completions", {"prompt": "a" * 4_000_000})
    assert (status, answer["error"]["code"]) == (400, "unsupported_endpoint")


def test_text_paths_are_refused(worker: WatchedWorker) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    status, answer = worker.call("POST", "/v1/chat/completions", {"messages": messages})
    assert (status, answer["error"]["code"]) == (400, "unsupported_endpoint")
    status, answer = worker.call("POST", "/api/chat", {"messages": messages})
    assert status == 400
    assert isinstance(answer["error"], str)
    assert worker.call("GET", "/v1/embeddings")[0] == 405
    assert worker.call("POST", "/v1/none")[0] == 404


def test_ollamas_embed_cuts_by_default_and_refuses_when_told(worker: WatchedWorker) -> None:
    answer = worker.post("/api/embed", {"model": "m", "input": [CAT, "word " * 700]})
    assert answer["model"] == "m"
    assert [len(one) for one in answer["embeddings"]] == [576, 576]
    assert answer["prompt_eval_count"] > 600
    assert answer["total_duration"] > 0
    assert answer["load_duration"] == 0
    assert np.dot(answer["embeddings"][0], vectors(worker, CAT)[0]) > 0.999
    status, refused = worker.call("POST", "/api/embed", {"input": "word " * 700, "truncate": False})
    assert status == 400
    assert "600" in refused["error"]
    assert worker.post("/api/embed", {"input": ""})["embeddings"] == []
    assert len(worker.post("/api/embeddings", {"prompt": CAT})["embedding"]) == 576


def test_the_official_ollama_client_embeds(worker: WatchedWorker) -> None:
    with ollama.Client("http://worker", transport=httpx.HTTPTransport(uds=str(worker.spec.socket))) as client:
        told = client.embed("m", [CAT, STOCKS])
        assert [len(one) for one in told.embeddings] == [576, 576]
        assert np.dot(told.embeddings[0], vectors(worker, CAT)[0]) > 0.999
        assert len(client.embed("m", CAT, dimensions=64).embeddings[0]) == 64
        assert len(client.embeddings("m", CAT).embedding) == 576


def test_work_for_a_client_who_left_stops(worker: WatchedWorker) -> None:
    before = worker.health()["steps"]
    connection = worker.connect()
    connection.request("POST", "/v1/embeddings", b'{"input": ["' + b'", "'.join([b"word " * 500] * 60) + b'"]}')
    eventually(lambda: bool(worker.health()["steps"] > before), "the work has begun")
    connection.close()
    eventually(lambda: bool(worker.health()["active"] == 0), "the work has stopped")
    assert worker.health()["steps"] - before < 60
    eventually(
        lambda: any(
            getattr(getattr(event, "record", None), "error_code", None) == "inference.client_disconnected"
            for event in worker.events
        ),
        "a record says so",
    )


def test_a_deadline_ends_a_long_request(worker: WatchedWorker) -> None:
    connection = worker.connect()
    body = b'{"input": ["' + b'", "'.join([b"word " * 500] * 60) + b'"]}'
    connection.request("POST", "/v1/embeddings", body, {"x-garrison-timeout-ms": "300"})
    assert connection.getresponse().status == 504
    connection.close()


def test_the_gate_judges_by_similarity(worker: WatchedWorker) -> None:
    good = SimilarityCase(id="cats", anchor=CAT, closer=RUG, farther=STOCKS)
    bad = SimilarityCase(id="stocks", anchor=CAT, closer=STOCKS, farther=RUG)
    strict = SimilarityCase(id="strict", anchor=CAT, closer=RUG, farther=STOCKS, margin=0.9)
    records = len(worker.events)
    for cases, passed in (((good,), 1), ((good, bad, strict), 1)):
        evaluation = Evaluation(cases=cases, min_accuracy=1)
        result = run_gate(worker.spec.socket, worker.spec.model_id, evaluation, GateLimits(), rss_mb=None)
        assert result.summary.passed == passed
        assert result.passed is (len(cases) == 1), result.message
        assert result.summary.tokens_per_s is None
    assert len(worker.events) == records, "the gate leaves no records"
    choice = ChoiceCase(id="one", prompt="x", choices=("a", "b"), expected=0)
    refused = run_gate(
        worker.spec.socket, "m:1", Evaluation(cases=(choice,), min_accuracy=1), GateLimits(), rss_mb=None
    )
    assert refused.failure_code == "gate.accuracy"


@pytest.mark.parametrize("pooling", ["none", "rank", 3])
def test_another_pooling_is_refused(pooling: str | int, short_folder: Path) -> None:
    spec = llama_spec(smollm2(), short_folder / "p.sock", settings={"embedding": True, "pooling": pooling})
    with WatchedWorker(spec) as worker:
        failed = worker.failed()
    assert failed.code == "model.load_failed"
    assert "pooling" in failed.message


def test_the_last_token_alone_is_another_pooling(worker: WatchedWorker, short_folder: Path) -> None:
    settings: dict[str, str | bool] = {"embedding": True, "pooling": "last"}
    with WatchedWorker(llama_spec(smollm2(), short_folder / "l.sock", settings=settings)) as last:
        assert last.ready().metadata["pooling"] == "last"
        one = vectors(last, [CAT, LONG])
    assert one[0] @ vectors(worker, CAT)[0] < 0.99
    with WatchedWorker(llama_spec(smollm2(), short_folder / "t.sock", settings={})) as text:
        text.ready()
        status, answer = text.call("POST", "/v1/embeddings", {"input": CAT})
    assert (status, answer["error"]["code"]) == (400, "unsupported_endpoint")


def test_a_model_that_looks_both_ways_pools_as_its_file_says(tmp_path: Path, short_folder: Path) -> None:
    files = [
        tiny_encoder(tmp_path / f"{pooling}.gguf", context=100, pooling=pooling)
        for pooling in (gguf.PoolingType.CLS, gguf.PoolingType.MEAN)
    ]
    found = []
    for file, name in zip(files, ("cls", "mean"), strict=True):
        spec = llama_spec(file, short_folder / "e.sock", settings={"embedding": True})
        with WatchedWorker(spec) as worker:
            facts = worker.ready().metadata
            assert (facts["pooling"], facts["context_length"], facts["dimensions"]) == (name, 100, 32)
            together = vectors(worker, ["a b c", "d e f", "a"] * 8)
            alone = vectors(worker, "d e f")[0]
            assert all(float(alone @ together[index]) > 0.999 for index in range(1, 24, 3))
            assert float(alone @ together[0]) < 0.99
            cut = worker.post("/api/embed", {"input": ["a " * 500, "a " * 98, "a " * 97]})
            assert cut["prompt_eval_count"] == 100 + 100 + 99
            assert cut["embeddings"][0] == pytest.approx(cut["embeddings"][1], abs=1e-3), "the ending token is kept"
            assert worker.call("POST", "/v1/embeddings", {"input": "a " * 99})[0] == 400
            found.append(alone)
    assert float(found[0] @ found[1]) < 0.99


def test_a_ranker_is_no_embedding_model(tmp_path: Path, short_folder: Path) -> None:
    file = tiny_encoder(tmp_path / "rank.gguf", context=64, pooling=gguf.PoolingType.RANK)
    with WatchedWorker(llama_spec(file, short_folder / "r.sock", settings={"embedding": True})) as worker:
        failed = worker.failed()
    assert failed.code == "model.load_failed"
