from __future__ import annotations

import json
from typing import Any

import pytest

from garrison_agent.runtimes.llama.generation import Options
from garrison_agent.runtimes.openai.api_errors import ApiError
from garrison_agent.runtimes.openai.chat_requests import ChatRequest
from garrison_agent.runtimes.openai.requests import CompletionRequest, parse_request
from garrison_agent.runtimes.openai.responses_requests import ResponseRequest

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


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "invalid_value",
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "messages.0.content.0.text"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": "warm"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": -5}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 2**31}, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**400}, "invalid_value", "max_tokens"),
        ({"top_k": 2**40}, "invalid_value", "top_k"),
        ({"seed": 10**30}, "invalid_value", "seed"),
        ({"frequency_penalty": 2.5}, "invalid_value", "frequency_penalty"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 9}, "invalid_value", "n"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"Paris": 1}}, "invalid_value", "logit_bias"),
        ({"functions": [{}]}, "unsupported_parameter", "functions"),
        ({"function_call": "auto"}, "unsupported_parameter", "functions"),
        ({"audio": {"voice": "x"}}, "unsupported_parameter", "modalities"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools.0.function"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools.0.function.name"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        ({"tools": [TOOL] * 129}, "invalid_value", "tools"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_value",
            "tool_choice",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "unsupported_parameter", "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema.schema"),
        ({"grammar": "root ::= x"}, "unsupported_parameter", "grammar"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    error = refused.value.body()["error"]
    assert (refused.value.status, error["type"], error["code"]) == (400, "invalid_request_error", code)
    assert error["param"] == param
    json.dumps(error)


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest, ResponseRequest])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b"1e",
        b"NaN,",
    ],
)
def test_a_body_that_is_not_json_is_refused(model: Any, data: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(model, data)
    assert refused.value.body()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("data", [b"null", b"[]", b'"a"', b"1"])
def test_a_body_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(ChatRequest, data)
    assert refused.value.body()["error"]["code"] == "invalid_value"


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_a_completion_takes_prompts_in_every_form(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], ["a", [1]], [-1], [1.5], [True], None, ["a"] * 65, {}])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as refused:
        completion(prompt=prompt)
    assert (refused.value.code, (refused.value.param or "").partition(".")[0]) == ("inference.invalid_value", "prompt")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1]}, "echo"),
    ],
)
def test_what_completions_lack_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        completion(**fields)
    assert (refused.value.code, refused.value.param) == ("inference.unsupported_parameter", param)


def test_as_many_best_as_asked_for_is_fine() -> None:
    assert completion(best_of=2, n=2).copies == 2


@pytest.mark.parametrize(("logprobs", "top"), [(None, None), (False, None), (0, 0), (5, 5)])
def test_log_probabilities_are_counted(logprobs: Any, top: int | None) -> None:
    assert completion(logprobs=logprobs).top_logprobs == top


def test_a_bias_reaches_the_engine_by_number() -> None:
    assert chat(logit_bias={"5": -100, "7": 1.5}).options(None).logit_bias == ((5, -100.0), (7, 1.5))


@pytest.mark.parametrize(
    ("fields", "required", "several", "names"),
    [
        ({}, False, True, ["f"]),
        ({"parallel_tool_calls": False}, False, False, ["f"]),
        ({"tool_choice": "required"}, True, False, ["f"]),
        ({"tool_choice": "required", "parallel_tool_calls": True}, True, True, ["f"]),
        ({"tool_choice": NAMED, "parallel_tool_calls": True}, True, False, ["f"]),
    ],
)
def test_tools_say_what_an_answer_may_be(
    fields: dict[str, Any], required: bool, several: bool, names: list[str]
) -> None:
    use = chat(tools=[TOOL], **fields).tool_use
    assert use is not None
    assert (use.required, use.several, list(use.schemas)) == (required, several, names)


def test_no_tool_is_offered_when_none_may_be_called() -> None:
    request = chat(tools=[TOOL], tool_choice="none")
    assert request.tool_use is None
    assert request.template_tools == []


def test_calls_reach_templates_with_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    turns = chat(
        messages=[
            {"role": "assistant", "content": None, "tool_calls": [call, broken]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
        ]
    ).turns
    first, second = turns[0]["tool_calls"]
    assert first["function"]["arguments"] == {"a": 1}
    assert second["function"]["arguments"] == "[" * 100_000
    assert turns[1] == {"role": "tool", "content": "x", "tool_call_id": "1"}


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, True),
        ({"type": "json_object", "schema": {"type": "object"}}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}}}, {"a": 1}),
    ],
)
def test_a_format_says_what_the_answer_must_meet(form: Any, wanted: Any) -> None:
    assert chat(response_format=form).wanted_schema == wanted
