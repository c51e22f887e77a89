"""Ollama's words spoken by the text worker, with the real SmolLM2; the official ``ollama`` client asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from tests.integration.runtimes.test_llama_worker import COLORS, FRANCE, QUESTION
from tests.integration.runtimes.workers import WatchedWorker, eventually

pytestmark = pytest.mark.integration

EXACT = {"temperature": 0, "repeat_penalty": 1.0}
"""What makes answers of both APIs the same: by default, Ollama does not repeat itself."""
COUNT = "/v1/chat/completions/tokenizer/encode/count"


@pytest.fixture(scope="module")
def client(llama: WatchedWorker) -> Iterator[ollama.Client]:
    transport = httpx.HTTPTransport(uds=str(llama.spec.socket))
    with ollama.Client("http://worker", transport=transport) as running:
        yield running


def test_a_chat_is_answered_with_counts_and_durations(client: ollama.Client) -> None:
    answer = client.chat("chat:latest", QUESTION, options=EXACT)
    assert answer.message.content == COLORS
    assert (answer.model, answer.done, answer.done_reason) == ("chat:latest", True, "stop")
    assert answer.prompt_eval_count is not None
    assert answer.prompt_eval_count > 20
    assert answer.eval_count is not None
    assert answer.eval_count > 8
    assert answer.total_duration is not None
    assert answer.prompt_eval_duration is not None
    assert answer.eval_duration is not None
    assert answer.total_duration >= answer.prompt_eval_duration + answer.eval_duration > 0


def test_a_stream_says_the_same_in_lines(client: ollama.Client) -> None:
    parts = list(client.chat("chat", QUESTION, options=EXACT, stream=True))
    assert "".join(part.message.content or "" for part in parts) == COLORS
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 2
    assert parts[-1].done_reason == "stop"
    assert parts[-1].eval_count == client.chat("chat", QUESTION, options=EXACT).eval_count


def test_it_streams_unless_asked_otherwise(llama: WatchedWorker) -> None:
    connection = llama.connect()
    body = {"model": "chat", "prompt": FRANCE, "raw": True, "options": {**EXACT, "num_predict": 3}}
    connection.request("POST", "/api/generate", json.dumps(body).encode())
    response = connection.getresponse()
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.read().splitlines()]
    connection.close()
    assert "".join(line["response"] for line in lines).startswith(" Paris.")
    assert lines[-1]["done_reason"] == "length"
    assert lines[-1]["eval_count"] == 3
    assert "context" not in lines[-1]  # raw has no conversation


def test_the_time_that_loading_took_is_passed_on(llama: WatchedWorker) -> None:
    connection = llama.connect()
    body = {"model": "chat", "prompt": "x", "raw": True, "stream": False, "options": {"num_predict": 1}}
    connection.request("POST", "/api/generate", json.dumps(body).encode(), {"x-garrison-load-ms": "1500"})
    told = json.loads(connection.getresponse().read())
    connection.close()
    assert told["load_duration"] == 1_500_000_000
    assert told["total_duration"] > told["load_duration"]


def test_a_prompt_with_a_system_text_is_a_conversation(client: ollama.Client, llama: WatchedWorker) -> None:
    system = "Answer in one word."
    said = client.generate("chat", "What is the capital of France?", system=system, options=EXACT).response
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What is the capital of France?"}]
    told = llama.post("/v1/chat/completions", {"messages": messages, "temperature": 0})
    assert said == told["choices"][0]["message"]["content"]


def test_the_context_carries_a_conversation_on(client: ollama.Client) -> None:
    first = client.generate("chat", "My name is Ada. Remember it.", options={**EXACT, "num_predict": 24})
    assert first.context is not None
    second = client.generate("chat", "What is my name?", context=first.context, options={**EXACT, "num_predict": 24})
    assert "Ada" in (second.response or "")
    assert second.context is not None
    assert list(second.context[: len(first.context)]) == list(first.context)
    assert second.prompt_eval_count is not None
    assert second.prompt_eval_count > len(first.context)


def test_a_stop_string_and_a_length_end_an_answer(client: ollama.Client) -> None:
    stopped = client.generate("chat", FRANCE, raw=True, options={**EXACT, "stop": ["."]})
    assert (stopped.response, stopped.done_reason) == (" Paris", "stop")
    cut = client.generate("chat", FRANCE, raw=True, options={**EXACT, "num_predict": 2})
    assert (cut.done_reason, cut.eval_count) == ("length", 2)


def test_json_and_schemas_hold_the_answer(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    told = client.chat("chat", QUESTION, format=schema, options={**EXACT, "num_predict": 60}).message.content
    value = json.loads(told or "")
    assert value["color"] in ("red", "blue")
    assert isinstance(value["count"], int)
    any_object = client.generate("chat", "Name a color.", format="json", options={**EXACT, "num_predict": 200})
    assert isinstance(json.loads(any_object.response or ""), dict)


def test_log_probabilities_come_with_their_tokens(client: ollama.Client) -> None:
    options = {**EXACT, "num_predict": 2}
    answer = client.generate("chat", FRANCE, raw=True, logprobs=True, top_logprobs=2, options=options)
    assert answer.logprobs is not None
    assert "".join(one.token for one in answer.logprobs) == answer.response
    assert all(one.logprob <= 0 for one in answer.logprobs)
    assert all(len(one.top_logprobs or ()) == 2 for one in answer.logprobs)


def test_tools_are_offered_and_an_answer_stays_text(client: ollama.Client) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    with_tools = client.chat("chat", QUESTION, tools=[tool], options={**EXACT, "num_predict": 40})
    without = client.chat("chat", QUESTION, options={**EXACT, "num_predict": 40})
    assert (with_tools.prompt_eval_count or 0) > (without.prompt_eval_count or 0) + 20  # the model was told of them
    calls = with_tools.message.tool_calls or ()
    assert with_tools.message.content or calls
    assert all(call.function.name == "get_weather" for call in calls)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        ({"messages": [{"role": "user", "content": "x"}], "model": "chat", "options": {"num_ctx": 99999}}, "num_ctx"),
        ({"messages": [{"role": "user", "content": "word " * 4000}], "model": "chat"}, "context"),
        ({"messages": [{"role": "user", "content": "x"}], "model": "chat", "think": True}, "think"),
        ({"messages": [{"role": "user", "content": "x"}], "model": "chat", "format": {"type": "ghost"}}, "type is one"),
    ],
)
def test_errors_are_one_string(llama: WatchedWorker, body: Any, says: str) -> None:
    status, answer = llama.call("POST", "/api/chat", body)
    assert status == 400
    assert answer.keys() == {"error"}
    assert says in answer["error"]


def test_tokens_that_do_not_exist_are_refused(llama: WatchedWorker) -> None:
    status, answer = llama.call("POST", "/api/generate", {"model": "chat", "prompt": "x", "context": [10**6]})
    assert status == 400
    assert "token" in answer["error"]


def test_a_text_model_makes_no_embeddings(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not support embeddings"):
        client.embed("chat", "hello")


def test_a_client_that_leaves_stops_the_answer(llama: WatchedWorker) -> None:
    connection = llama.connect()
    body = {"model": "chat", "prompt": "Count to a thousand.", "raw": True, "options": {"num_predict": 1500}}
    connection.request("POST", "/api/generate", json.dumps(body).encode())
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()
    eventually(lambda: llama.health()["active"] == 0, "nobody generates any more", timeout_s=10)


def test_tokens_are_counted_without_an_answer(llama: WatchedWorker) -> None:
    body = {"model": "chat", "messages": QUESTION}
    counted = llama.post(COUNT, body)
    told = llama.post("/v1/chat/completions", {**body, "max_tokens": 1})
    assert counted == {"tokenCount": told["usage"]["prompt_tokens"]}
    assert llama.call("POST", COUNT, {"model": "chat"})[0] == 400
