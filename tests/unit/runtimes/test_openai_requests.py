from __future__ import annotations

import json
from typing import Any

import pytest

from garrison_agent.runtimes.batching import Options
from garrison_agent.runtimes.openai_requests import ApiError, ChatRequest, CompletionRequest, parse_request

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode())


def test_what_is_not_asked_takes_the_engines_defaults() -> None:
    assert chat().options(None) == Options()


def test_sampling_values_reach_the_engine() -> None:
    options = chat(temperature=0, top_p=0.5, seed=-7, stop="x", presence_penalty=1).options(9)
    assert (options.temperature, options.top_p, options.seed, options.stop) == (0, 0.5, -7, ("x",))
    assert (options.presence_penalty, options.max_tokens) == (1, 9)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).turns == [{"role": "user", "content": "ab"}]


def test_a_newer_clients_unknown_fields_are_tolerated() -> None:
    assert chat(service_tier="auto", user="me", store=False).turns == HELLO


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", None),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "invalid_value", None),
        ({"stop": ""}, "invalid_value", None),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"logit_bias": {"1": 5}}, "unsupported_parameter", "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], code: str, param: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    error = refused.value.body()["error"]
    assert (refused.value.status, error["type"], error["code"]) == (400, "invalid_request_error", code)
    assert param is None or error["param"] == param


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 10_000])
def test_a_body_that_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(CompletionRequest, data)
    assert refused.value.body()["error"]["code"] == "invalid_json"


def test_a_completion_takes_one_prompt_in_either_form() -> None:
    assert parse_request(CompletionRequest, b'{"prompt": "a"}').text == "a"
    assert parse_request(CompletionRequest, b'{"prompt": ["a"]}').text == "a"
    with pytest.raises(ApiError):
        parse_request(CompletionRequest, b'{"prompt": ["a", "b"]}')
