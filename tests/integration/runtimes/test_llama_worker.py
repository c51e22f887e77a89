"""The text worker with the real SmolLM2: OpenAI's words, many answers at once, and clients who leave."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.integration.runtimes.workers import WatchedWorker, eventually, llama_spec, read_events, smollm2

pytestmark = pytest.mark.integration

QUESTION = [{"role": "user", "content": "Name three colors."}]
COLORS = "1. Red\n2. Blue\n3. Green"
FRANCE = "The capital of France is"
STORY = "Once upon a time there was a"
PROMPTS = (
    FRANCE,
    STORY,
    "Water is made of",
    "one two three four one two three four one two three four one",
)
NEARLY = 1.0
"""How far apart the log-probabilities of two words may be for rounding to decide between them. In a shared cache the
same sums are done in another order, and weights of four bits make much of it: one sequence alone, with and without
flash attention, moves the log-probabilities of this model's first fifty tokens by up to 0.4. A word that belongs to
somebody else's answer is several away."""


def greedy(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 24, **more}


def test_a_chat_is_answered_with_counts(llama: WatchedWorker) -> None:
    answer = llama.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0, "model": "smollm2"})
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "smollm2-135m-instruct:1.0.0"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": COLORS}
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["prompt_tokens"] > 20
    assert usage["completion_tokens"] > 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_official_client_streams_the_same_answer(llama: WatchedWorker) -> None:
    transport = httpx2.HTTPTransport(uds=str(llama.spec.socket))
    with (
        httpx2.Client(transport=transport) as http,
        openai.OpenAI(base_url="http://worker/v1", api_key="none", http_client=http) as client,
    ):
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Name three colors."}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == COLORS
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens > 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_has_none(llama: WatchedWorker) -> None:
    connection, response = llama.stream("/v1/completions", greedy(FRANCE, max_tokens=3))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response)
    connection.close()
    assert "".join(event["choices"][0]["text"] for event in events).startswith(" Paris.")
    assert all("usage" not in event for event in events)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_ends_the_answer(llama: WatchedWorker) -> None:
    answer = llama.post("/v1/completions", greedy(FRANCE, stop=["."]))
    assert answer["choices"][0]["text"] == " Paris"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_seed_repeats_an_answer_and_another_does_not(short_folder: Path) -> None:
    """In a worker of its own, with one sequence: the cache's order decides the rounding."""
    with WatchedWorker(llama_spec(smollm2(), short_folder / "seeds.sock", parallel=1)) as worker:
        worker.ready()

        def sample(seed: int) -> str:
            request = {"prompt": STORY, "temperature": 1.5, "top_k": 0, "max_tokens": 24, "seed": seed}
            text = worker.post("/v1/completions", request)["choices"][0]["text"]
            assert isinstance(text, str)
            return text

        assert sample(7) == sample(7)
        assert sample(7) != sample(8)


def test_four_answers_at_once_are_those_each_gives_alone(llama: WatchedWorker) -> None:
    def text(prompt: str) -> str:
        answer = llama.post("/v1/completions", greedy(prompt))["choices"][0]["text"]
        assert isinstance(answer, str)
        return answer

    alone = [text(prompt) for prompt in PROMPTS]
    barrier = threading.Barrier(len(PROMPTS))

    def at_once(prompt: str) -> str:
        barrier.wait()
        return text(prompt)

    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        together = list(clients.map(at_once, PROMPTS))
    for prompt, one, other in zip(PROMPTS, alone, together, strict=True):
        assert one == other or gap_where_they_part(llama, prompt, one, other) < NEARLY


def gap_where_they_part(llama: WatchedWorker, prompt: str, one: str, other: str) -> float:
    """Return how far apart the model finds the first pieces in which two answers differ.

    A piece is a word or a mark alone, as the tokenizer cuts them: the mark after a word is a choice of its own.
    """
    pieces = [re.findall(r"\s?\w+|\s?[^\w\s]|\s", answer) for answer in (one, other)]
    same = next(at for at, pair in enumerate(zip(*pieces, strict=False)) if pair[0] != pair[1])
    request = {"prompt": prompt + "".join(pieces[0][:same]), "choices": [answer[same] for answer in pieces]}
    first, second = llama.post("/internal/score", request)["logprobs"]
    return abs(float(first) - float(second))


def test_four_streams_run_side_by_side(llama: WatchedWorker) -> None:
    """Each gets its first token before any of the others has ended."""
    request = greedy(STORY, max_tokens=400, ignore_eos=True)
    streams = [llama.stream("/v1/completions", request) for _ in range(4)]
    for _, response in streams:
        assert response.readline().startswith(b"data: ")
    assert llama.health()["active"] == 4
    for connection, _ in streams:
        connection.close()
    eventually(lambda: llama.health()["active"] == 0, "all streams stopped")


def test_a_fifth_request_waits_and_is_answered(llama: WatchedWorker) -> None:
    request = greedy(STORY, max_tokens=300, ignore_eos=True)
    streams = [llama.stream("/v1/completions", request) for _ in range(4)]
    eventually(lambda: llama.health()["active"] == 4, "four run")
    fifth, response = llama.stream("/v1/completions", greedy(FRANCE, max_tokens=2))
    assert llama.health()["queued"] == 1
    for connection, _ in streams:
        connection.close()
    assert len(read_events(response)) >= 2
    fifth.close()


def test_a_client_that_leaves_a_stream_stops_it_within_a_few_tokens(llama: WatchedWorker) -> None:
    before = llama.health()
    connection, response = llama.stream("/v1/completions", greedy(STORY, max_tokens=2000, ignore_eos=True))
    for _ in range(6):
        response.readline()
    response.close()
    connection.close()
    eventually(lambda: llama.health()["active"] == 0, "the generation stops")
    after = llama.health()
    assert after["completion_tokens"] - before["completion_tokens"] < 100
    assert after["queued"] == 0


def test_a_client_that_leaves_before_a_whole_answer_stops_it(llama: WatchedWorker) -> None:
    connection = llama.connect()
    body = b'{"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": true}'
    connection.request("POST", "/v1/completions", body)
    eventually(lambda: llama.health()["active"] == 1, "it runs")
    connection.close()
    eventually(lambda: llama.health()["active"] == 0, "it stops")


def test_a_client_that_leaves_while_its_prompt_is_read_stops_that(short_folder: Path) -> None:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock", context_length=8192, parallel=1)) as worker:
        worker.ready()
        connection, _ = worker.stream("/v1/completions", greedy("word " * 8000, max_tokens=100))
        eventually(lambda: worker.health()["active"] == 1, "the prompt is being read")
        connection.close()
        record = worker.record()
        assert record.error_code == "inference.client_disconnected"
        assert record.completion_tokens == 0
        eventually(lambda: worker.health()["active"] == 0, "reading stops")


def test_records_tell_what_happened_without_its_content(short_folder: Path) -> None:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock")) as worker:
        worker.ready()
        worker.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0})
        answered = worker.record()
        assert (answered.kind, answered.ok, answered.error_code, answered.status) == ("chat", True, None, 200)
        assert answered.prompt_tokens > 20
        assert answered.completion_tokens > 8
        assert answered.ttft_ms is not None
        assert 0 < answered.ttft_ms < answered.duration_ms
        assert answered.tokens_per_s is not None

        worker.call("POST", "/v1/completions", {"prompt": "word " * 3000})
        refused = worker.record(count=2)
        assert (refused.kind, refused.ok, refused.status) == ("completion", False, 400)
        assert refused.error_code == "inference.context_length_exceeded"

        connection, response = worker.stream("/v1/completions", greedy("a", max_tokens=2000, ignore_eos=True))
        response.readline()
        response.close()
        connection.close()
        left = worker.record(count=3)
        assert (left.ok, left.error_code) == (True, "inference.client_disconnected")
        assert 0 < left.completion_tokens < 1000

        worker.post("/internal/v1/completions", greedy("a"))
        worker.post("/v1/completions", greedy("a", max_tokens=5))
        assert worker.record(count=4).completion_tokens == 5, "the gate's own requests leave no record"


def test_the_next_turn_of_a_conversation_reuses_what_was_read(llama: WatchedWorker) -> None:
    first = llama.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0, "max_tokens": 32})
    turns = [*QUESTION, first["choices"][0]["message"], {"role": "user", "content": "And one more?"}]
    second = llama.post("/v1/chat/completions", {"messages": turns, "temperature": 0, "max_tokens": 8})
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_a_long_request_for_what_it_does_not_do_is_refused_in_words(llama: WatchedWorker, path: str) -> None:
    """Not by a connection that breaks off: the agent would take that for a worker that died."""
    status, answer = llama.call_once(path, {"input": "a" * 4_000_000})
    assert status == 400
    assert "embeddings" in json.dumps(answer)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{not json", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {"messages": QUESTION, "tools": [{}]}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {"messages": QUESTION, "functions": [{}]}, 400, "unsupported_parameter"),
        ("POST", "/v1/completions", {"prompt": "word " * 3000}, 400, "context_length_exceeded"),
        ("POST", "/v1/completions", {"prompt": ""}, 400, "prompt_empty"),
        ("POST", "/v1/completions", b" " * (16 * 1024 * 1024 + 1), 413, "body_too_large"),
        ("POST", "/v1/embeddings", {"input": "a"}, 400, "unsupported_endpoint"),
        ("GET", "/v1/completions", None, 405, "method_not_allowed"),
        ("POST", "/score", {"prompt": "a", "choices": ["b", "c"]}, 404, "unknown_path"),
        ("GET", "/nothing", None, 404, "unknown_path"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(
    llama: WatchedWorker, method: str, path: str, body: object, status: int, code: str
) -> None:
    got, answer = llama.call(method, path, body)
    assert got == status
    assert answer["error"]["code"] == code
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_streamed_request_that_is_refused_is_a_plain_error(llama: WatchedWorker) -> None:
    status, answer = llama.call("POST", "/v1/completions", {"prompt": "word " * 3000, "stream": True})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_scores_prefer_what_is_true(llama: WatchedWorker) -> None:
    scores = llama.post("/internal/score", {"prompt": FRANCE, "choices": [" Paris", " Berlin", " Madrid"]})
    best, *others = scores["logprobs"]
    assert all(other < best < 0 for other in others)


def test_a_score_is_the_same_while_answers_run(llama: WatchedWorker) -> None:
    request = {"prompt": FRANCE, "choices": [" Paris", " Berlin"]}
    alone = llama.post("/internal/score", request)["logprobs"]
    connection, response = llama.stream("/v1/completions", greedy(STORY, max_tokens=500, ignore_eos=True))
    response.readline()
    beside = llama.post("/internal/score", request)["logprobs"]
    connection.close()
    assert beside == pytest.approx(alone, abs=0.05)
    eventually(lambda: llama.health()["active"] == 0, "the stream stops")
