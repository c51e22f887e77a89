from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from garrison_agent.runtimes.llama.generation import TokenLogprob
from garrison_agent.runtimes.ollama.answers import Wording

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOLD = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}


def read(lines: bytes) -> list[dict[str, Any]]:
    return [json.loads(one) for one in lines.splitlines()]


def test_a_line_of_a_chat() -> None:
    (told,) = read(Wording("m", chat=True).lines('a "quoted"\nword é', (), last=False))
    assert datetime.fromisoformat(told.pop("created_at")).tzinfo is not None
    content = {"role": "assistant", "content": 'a "quoted"\nword é'}
    assert told == {"model": "m", "message": content, "done": False}


def test_a_line_of_a_response() -> None:
    (told,) = read(Wording('odd "@text@" name', chat=False).lines("hello", (), last=False))
    assert (told["model"], told["response"], told["done"]) == ('odd "@text@" name', "hello", False)
    assert Wording("m", chat=False).lines("", (), last=False) == b""


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tool_calls_are_taken_out_of_the_text(size: int) -> None:
    wording = Wording("m", chat=True, tools=["weather"])
    text = f"Let me see. {CALL}"
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    messages: list[dict[str, Any]] = []
    for at, part in enumerate(parts):
        lines = wording.lines(part, (), last=at == len(parts) - 1)
        messages += [one["message"] for one in read(lines)]
    assert "".join(message["content"] for message in messages).strip() == "Let me see."
    assert [call for message in messages for call in message.get("tool_calls", [])] == [TOLD]


def test_a_call_that_is_cut_short_is_none() -> None:
    wording = Wording("m", chat=True, tools=["weather"])
    assert wording.take(CALL[:40], last=True) == ("", [])


def test_without_tools_nothing_is_taken_out() -> None:
    assert Wording("m", chat=True).take(CALL, last=True) == (CALL, [])


def test_the_last_object_has_the_facts() -> None:
    told = Wording("m", chat=True, tools=["weather"]).last("text", [TOLD], (), {"done_reason": "stop"})
    assert told["message"] == {"role": "assistant", "content": "text", "tool_calls": [TOLD]}
    assert (told["done"], told["done_reason"]) == (True, "stop")


def test_log_probabilities_are_told_with_their_text() -> None:
    one = TokenLogprob(b"\xc3", -0.5, ((b"hi", -0.5), (b"\xff", -2.0)))
    (told,) = read(Wording("m", chat=False).lines("é", (one,), last=False))
    assert told["response"] == "é"
    assert told["logprobs"] == [
        {
            "token": "�",
            "logprob": -0.5,
            "bytes": [0xC3],
            "top_logprobs": [
                {"token": "hi", "logprob": -0.5, "bytes": [104, 105]},
                {"token": "�", "logprob": -2.0, "bytes": [255]},
            ],
        }
    ]
