"""The official OpenAI client against a text worker with the real SmolLM2: every documented way to ask and to answer.

The model is tiny: what it must get right, a grammar holds it to; the rest is about form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx2
import openai
import pytest
from openai.types.chat import (
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionMessageParam,
    ChatCompletionToolUnionParam,
)
from openai.types.responses import ResponseInputParam
from pydantic import BaseModel

from tests.integration.runtimes.workers import WatchedWorker

pytestmark = pytest.mark.integration

MODEL = "smollm2"
COUNT: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Count: 1"},
    {"role": "assistant", "content": "1 2 3 4 5"},
    {"role": "user", "content": "Count: 1"},
]
COUNTED = "1 2 3 4 5"
"""What the model says to ``COUNT``, each token at least 2.5 likelier (in log-probability) than the next best: rounding,
which depends on what else was asked before, decides nothing."""
STORY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story."}]
CONVERSATION: ResponseInputParam = [
    {"role": "user", "content": "Count: 1"},
    {"role": "assistant", "content": "1 2 3 4 5"},
    {"role": "user", "content": "Count: 1"},
]
FRANCE = "The capital of France is"
PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: ChatCompletionToolUnionParam = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS},
}
CLOCK: ChatCompletionToolUnionParam = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"$ref": "#/$defs/Zone"}},
            "required": ["zone"],
            "$defs": {"Zone": {"enum": ["UTC", "CET"]}},
        },
    },
}
ASK_WEATHER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Paris?"}]


class Fruit(BaseModel):
    name: Literal["apple", "pear"]
    ripe: bool


@pytest.fixture(scope="module")
def client(llama: WatchedWorker) -> Iterator[openai.OpenAI]:
    transport = httpx2.HTTPTransport(uds=str(llama.spec.socket))
    with (
        httpx2.Client(transport=transport) as http,
        openai.OpenAI(base_url="http://worker/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        yield client


def assert_weather(arguments: str) -> None:
    value = json.loads(arguments)
    assert set(value) == {"city", "unit"}
    assert value["unit"] in ("celsius", "fahrenheit")


def only_call(message: ChatCompletionMessage) -> ChatCompletionMessageFunctionToolCall:
    calls = message.tool_calls
    assert calls is not None
    assert len(calls) == 1
    assert isinstance(calls[0], ChatCompletionMessageFunctionToolCall)
    return calls[0]


def test_several_answers_have_an_index_and_their_own_seed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=STORY, n=3, seed=5, temperature=1.5, max_completion_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 36


def test_the_prompt_of_several_answers_is_counted_once(client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt=FRANCE, max_tokens=2)
    four = client.completions.create(model=MODEL, prompt=FRANCE, max_tokens=2, n=4)
    assert one.usage is not None
    assert four.usage is not None
    assert four.usage.prompt_tokens == one.usage.prompt_tokens
    assert four.usage.completion_tokens == 8


def test_streamed_answers_come_by_index_and_usage_at_the_end(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=COUNT, n=2, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = {0: "", 1: ""}
    ends = []
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            ends.append((choice.index, choice.finish_reason))
    assert texts == {0: COUNTED, 1: COUNTED}
    assert sorted(ends) == [(0, "stop"), (1, "stop")]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 16


def test_chat_logprobs_tell_each_token_and_its_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=COUNT, temperature=0, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == COUNTED
    for token in logprobs.content:
        assert bytes(token.bytes or []).decode() == token.token
        assert token.logprob <= 0
        first, second = token.top_logprobs
        assert first.logprob >= second.logprob
        assert first.token == token.token, "greedy takes the likeliest"
        assert first.logprob == pytest.approx(token.logprob)


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=COUNT, temperature=0, logprobs=True, stream=True)
    told = [choice for chunk in chunks for choice in chunk.choices if choice.logprobs is not None]
    tokens = [token for choice in told if choice.logprobs for token in choice.logprobs.content or ()]
    assert "".join(token.token for token in tokens) == COUNTED
    assert "".join(choice.delta.content or "" for choice in told) == COUNTED
    assert all(token.top_logprobs == [] for token in tokens)


def test_completion_logprobs_have_the_old_form(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0, max_tokens=4, logprobs=1)
    (choice,) = answer.choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == choice.text
    tokens = logprobs.tokens or []
    assert logprobs.text_offset == [len("".join(tokens[:at])) for at in range(len(tokens))]
    assert logprobs.top_logprobs is not None
    assert [list(top) for top in logprobs.top_logprobs] == [[token] for token in logprobs.tokens or ()]


def test_bias_forbids_and_forces_tokens(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0, max_tokens=1, logprobs=0)
    assert plain.choices[0].text == " Paris"
    forced = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0, max_tokens=3, logit_bias={"216": 100})
    pieces = forced.choices[0].text
    assert pieces == pieces[0] * 3, "one token, again and again"


def test_prompts_may_be_many_and_may_be_tokens(client: openai.OpenAI) -> None:
    several = client.completions.create(model=MODEL, prompt=[FRANCE, "one two three"], temperature=0, max_tokens=2, n=2)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == " Paris."
    assert texts[2] == texts[3] != " Paris."
    tokens = client.completions.create(model=MODEL, prompt=[504, 3575, 282], temperature=0, max_tokens=2)
    both = client.completions.create(model=MODEL, prompt=[[504, 3575, 282], [504]], temperature=0, max_tokens=2)
    assert both.choices[0].text == tokens.choices[0].text
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3


def test_an_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0, max_tokens=1, echo=True)
    assert whole.choices[0].text == FRANCE + " Paris"
    stream = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0, max_tokens=1, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == FRANCE + " Paris"


def test_a_token_that_the_model_lacks_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=[10_000_000], max_tokens=1)
    assert refused.value.code == "token_unknown"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="a", max_tokens=1, logit_bias={"10000000": 1})
    assert refused.value.code == "token_unknown"


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a cat."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


def test_the_clients_own_parsing_of_a_schema_succeeds(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "A fruit."}], response_format=Fruit, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Fruit)
    assert answer.choices[0].finish_reason == "stop"


def test_a_schema_that_is_cut_off_ends_with_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=COUNT,
        response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": Fruit.model_json_schema()}},
        max_tokens=3,
    )
    assert answer.choices[0].finish_reason == "length"


def test_a_schema_that_makes_no_grammar_is_refused_by_its_place(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL,
            messages=COUNT,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "f", "schema": {"type": "object", "not": {"type": "string"}}},
            },
        )
    assert refused.value.code == "schema_unsupported"
    assert (refused.value.param or "").startswith("response_format")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_required_comes(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK_WEATHER, tools=[WEATHER], tool_choice=choice, temperature=0
    )
    (got,) = answer.choices
    assert got.finish_reason == "tool_calls"
    assert got.message.content is None
    call = only_call(got.message)
    assert call.function.name == "get_weather"
    assert_weather(call.function.arguments)


def test_a_named_tool_is_the_one_among_many(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK_WEATHER,
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "function": {"name": "get_time"}},
    )
    call = only_call(answer.choices[0].message)
    assert call.function.name == "get_time"
    assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")


def test_a_streamed_call_comes_in_pieces_that_make_the_whole(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=ASK_WEATHER, tools=[WEATHER], tool_choice="required", temperature=0
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 2
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    call = only_call(choice.message)
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments
    assert_weather(call.function.arguments)
    assert not choice.message.content


@pytest.mark.parametrize("max_tokens", [8, 28])
def test_a_call_that_is_cut_off_is_neither_call_nor_text(client: openai.OpenAI, max_tokens: int) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK_WEATHER, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=max_tokens
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert not choice.message.content


def test_with_tools_at_hand_a_model_may_still_just_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=COUNT, tools=[WEATHER], tool_choice="auto", temperature=0, max_tokens=60
    )
    (choice,) = answer.choices
    assert "<tool_call>" not in (choice.message.content or "")
    for call in choice.message.tool_calls or ():
        assert call.type == "function"
        assert_weather(call.function.arguments)
    assert choice.message.content or choice.message.tool_calls


def test_a_call_of_the_models_own_choice_is_held_to_its_schema(client: openai.OpenAI) -> None:
    """It saw itself call before, with other arguments than the schema allows: from the opening on it cannot."""
    messages: list[ChatCompletionMessageParam] = []
    for number in range(3):
        messages += [
            {"role": "user", "content": "What is the weather in Paris?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": f"call_{number}",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"place": "Paris"}'},
                    }
                ],
            },
        ]
    answer = client.chat.completions.create(
        model=MODEL, messages=[*messages, messages[0]], tools=[WEATHER], temperature=0, parallel_tool_calls=False
    )
    call = only_call(answer.choices[0].message)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert_weather(call.function.arguments)


def test_what_came_of_a_call_is_read_by_the_model(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        *ASK_WEATHER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "It is raining, 11 degrees."},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=40
    )
    assert "rain" in (answer.choices[0].message.content or "")


def test_a_response_is_a_text(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=CONVERSATION, temperature=0)
    assert response.output_text == COUNTED
    assert response.status == "completed"
    assert response.model_dump()["store"] is False
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_instructions_and_items_are_the_conversation_of_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Answer in one word."},
            {"role": "user", "content": "The capital of France?"},
        ],
        temperature=0,
        max_tokens=8,
    )
    response = client.responses.create(
        model=MODEL,
        instructions="Answer in one word.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "The capital of France?"}]}],
        temperature=0,
        max_output_tokens=8,
    )
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert response.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def test_a_streamed_response_tells_the_documented_sequence(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input=CONVERSATION, temperature=0, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 3
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == COUNTED
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == COUNTED
    assert events[-1].response.usage is not None


def test_a_response_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="Tell me a story.", max_output_tokens=3, stream=True))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_the_clients_own_stream_of_a_response_with_a_call(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL,
        input="What is the weather in Paris?",
        tools=[{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}],
        tool_choice="required",
        temperature=0,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    (call,) = final.output
    assert call.type == "function_call"
    assert_weather(call.arguments)
    follow_up = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
            {"type": "function_call_output", "call_id": call.call_id, "output": "It is raining, 11 degrees."},
        ],
        temperature=0,
        max_output_tokens=40,
    )
    assert "rain" in follow_up.output_text


def test_the_clients_own_parsing_of_a_response_succeeds(client: openai.OpenAI) -> None:
    response = client.responses.parse(model=MODEL, input="A fruit.", text_format=Fruit)
    assert isinstance(response.output_parsed, Fruit)


def test_response_logprobs_come_when_they_are_included(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input=CONVERSATION,
        temperature=0,
        top_logprobs=1,
        include=["message.output_text.logprobs"],
    )
    (message,) = response.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert "".join(token.token for token in part.logprobs or ()) == COUNTED


@pytest.mark.parametrize(
    ("field", "value"),
    [("previous_response_id", "resp_1"), ("store", True), ("background", True), ("truncation", "auto")],
)
def test_what_a_board_does_not_keep_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="x", **{field: value})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", field)


def test_a_deadline_ends_an_answer(llama: WatchedWorker) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}
    for stream in (False, True):
        connection = llama.connect()
        headers = {"x-garrison-timeout-ms": "300", "x-garrison-app": "tests"}
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": stream}).encode(), headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        assert b'"code":"deadline_exceeded"' in answer
        assert response.status == (200 if stream else 504)
        assert answer.endswith(b"data: [DONE]\n\n") is stream


def test_an_error_inside_a_stream_reaches_the_client_as_one(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="Once upon a time",
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers={"x-garrison-timeout-ms": "500"},
    )
    with pytest.raises(openai.APIError, match="deadline"):
        list(stream)
