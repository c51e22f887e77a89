from __future__ import annotations

import json
from typing import Any

import pytest

from garrison_agent.runtimes.llama.generation import Options
from garrison_agent.runtimes.ollama.requests import ChatRequest, GenerateRequest
from garrison_agent.runtimes.openai.api_errors import ApiError
from garrison_agent.runtimes.openai.requests import parse_request
from garrison_agent.runtimes.openai.tool_calls_grammar import Constraint

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def generate(**fields: Any) -> GenerateRequest:
    return parse_request(GenerateRequest, json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}
    return parse_request(ChatRequest, json.dumps(body).encode())


def options(**fields: Any) -> Options:
    return generate(options=fields).to_options(2048, Constraint())


def test_defaults_are_ollamas() -> None:
    assert generate().to_options(2048, Constraint()) == Options(
        temperature=0.8, top_k=40, top_p=0.9, min_p=0.0, repeat_penalty=1.1
    )
    assert generate().stream
    assert generate(stream=None).stream
    assert not generate(stream=False).stream


def test_options_become_the_engines() -> None:
    given = {
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": 7,
        "num_predict": 12,
        "stop": ["a", "", "b"],
        "repeat_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
    }
    assert options(**given) == Options(
        max_tokens=12,
        temperature=0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        seed=7,
        stop=("a", "b"),
        repeat_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
    )


@pytest.mark.parametrize("endless", [-1, -2, 0])
def test_an_answer_without_a_length_goes_as_far_as_the_context(endless: int) -> None:
    assert options(num_predict=endless).max_tokens is None


@pytest.mark.parametrize(
    ("given", "penalty"),
    [({}, 1.1), ({"repeat_last_n": 0}, 1.0), ({"repeat_penalty": 0}, 1.0), ({"repeat_last_n": 64}, 1.1)],
)
def test_the_repeat_penalty_can_be_switched_off(given: dict[str, Any], penalty: float) -> None:
    assert options(**given).repeat_penalty == penalty


@pytest.mark.parametrize("penalty", [1e-46, 0.0099])
def test_a_repeat_penalty_next_to_nothing_is_refused(penalty: float) -> None:
    with pytest.raises(ApiError) as caught:
        options(repeat_penalty=penalty)
    assert caught.value.code == "inference.invalid_value"
    assert options(repeat_penalty=0.01).repeat_penalty == 0.01


def test_negative_means_ollamas_default() -> None:
    assert options(seed=-1).seed is None
    assert options(top_k=-1).top_k == 0


def test_how_a_model_is_loaded_is_not_the_clients_business() -> None:
    assert options(num_gpu=99, num_thread=64, use_mmap=False, num_batch=1, num_keep=5, numa=True) == options()
    assert options(num_ctx=2048, typical_p=1.0, mirostat=0, tfs_z=1) == options()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": {"num_ctx": 2049}}, "options.num_ctx"),
        ({"options": {"num_ctx": 0}}, "options.num_ctx"),
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"temperature": 1e999}}, "options.temperature"),
        ({"options": {"top_p": 1.5}}, "options.top_p"),
        ({"options": {"top_k": 2**31}}, "options.top_k"),
        ({"options": {"seed": 2**63}}, "options.seed"),
        ({"options": {"num_predict": 2**31}}, "options.num_predict"),
        ({"options": {"stop": ["x"] * 17}}, "options.stop"),
        ({"options": {"stop": "x" * 257}}, "options.stop"),
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"typical_p": 0.5}}, "options.typical_p"),
        ({"options": {"repeat_last_n": -1}}, "options.repeat_last_n"),
        ({"options": []}, "options"),
        ({"think": True}, "think"),
        ({"think": "high"}, "think"),
        ({"format": "yaml"}, "format"),
        ({"format": 3}, "format"),
        ({"suffix": "end"}, "suffix"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"images": ["aGk="]}, "images"),
        ({"raw": True, "system": "be kind"}, "raw"),
        ({"raw": True, "context": [1]}, "raw"),
        ({"context": [-1]}, "context.0"),
        ({"context": [2**31]}, "context.0"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"model": 5}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        generate(**fields).to_options(2048, Constraint())
    assert (refused.value.status, refused.value.param) == (400, param)


def test_what_says_nothing_is_accepted() -> None:
    generate(think=False, suffix="", images=[], format="", template="", context=None)


@pytest.mark.parametrize(("given", "wanted"), [("json", True), ({"type": "object"}, {"type": "object"}), ({}, {})])
def test_a_format_is_json_or_a_schema(given: Any, wanted: Any) -> None:
    assert generate(format=given).wanted_schema == wanted


def test_no_format_is_any_text() -> None:
    assert generate().wanted_schema is None
    assert generate(format="").wanted_schema is None


def test_a_prompt_is_a_conversation_of_its_own() -> None:
    assert generate(system="be kind").turns == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "p"},
    ]


def test_tool_calls_go_into_the_template_as_objects() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]
    request = chat(messages=messages, tools=[TOOL])
    assert request.turns == [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **call}]},
        {"role": "tool", "content": "sunny", "name": "weather"},
    ]
    assert request.tool_use is not None
    assert not request.tool_use.required
    assert list(request.tool_use.schemas) == ["weather"]
    assert chat().tool_use is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages.0.images"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ],
)
def test_messages_and_tools_are_checked(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
