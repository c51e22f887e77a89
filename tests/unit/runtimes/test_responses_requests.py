from __future__ import annotations

import json
from typing import Any

import pytest

from garrison_agent.runtimes.openai.api_errors import ApiError
from garrison_agent.runtimes.openai.requests import parse_request
from garrison_agent.runtimes.openai.responses_requests import ResponseRequest

FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}


def response(**fields: Any) -> ResponseRequest:
    return parse_request(ResponseRequest, json.dumps({"input": "hello", **fields}).encode())


def test_a_text_is_the_users_turn() -> None:
    assert response(instructions="Be brief.").turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]


def test_items_are_turns_and_neighbouring_calls_one() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": ""},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
    ]
    user, assistant, first, second = response(input=items).turns
    assert user == {"role": "user", "content": "a"}
    assert assistant["content"] == "b"
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"a": 1}, {}]
    assert first == {"role": "tool", "content": "x", "tool_call_id": "1"}
    assert second["content"] == "y"


def test_tools_have_chats_form_in_templates() -> None:
    request = response(tools=[FUNCTION], tool_choice={"type": "function", "name": "f"})
    assert request.template_tools == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    ]
    assert request.tool_use is not None
    assert request.tool_use.required


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"text": {"verbosity": "low"}}, None),
        ({"text": {"format": {"type": "json_object"}}}, True),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"a": 1}}}}, {"a": 1}),
    ],
)
def test_a_format_says_what_the_answer_must_meet(fields: dict[str, Any], wanted: Any) -> None:
    assert response(**fields).wanted_schema == wanted


def test_what_clients_send_unasked_is_no_reason_to_refuse() -> None:
    request = response(store=False, background=False, include=[], reasoning={"effort": "low"}, truncation="disabled")
    assert request.turns
    assert request.wanted_logprobs is None


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools.0.name"),
        ({"tools": [{**FUNCTION, "name": "a b"}]}, "invalid_value", "tools.0.name"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [{"role": "user"}]}, "invalid_value", "input.0.content"),
        ({"input": [{"content": "x"}]}, "invalid_value", "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "invalid_value", "input.0.content.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "unsupported_parameter", "input.0.type"),
        ({"input": [{"type": "computer_call"}]}, "unsupported_parameter", "input.0.type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "invalid_value", "input.0"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "invalid_value", "input.0"),
        ({"input": [{"role": "user", "content": "x"}] * 1025}, "invalid_value", "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "invalid_value", "text.format.schema"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        response(**fields)
    error = refused.value.body()["error"]
    assert (error["code"], error["param"]) == (code, param)
