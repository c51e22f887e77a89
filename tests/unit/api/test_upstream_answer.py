"""What is read of an upstream's answer on its way: tokens, whatever else stands in it, and nothing is changed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from garrison_agent.api.upstream_answer import MAX_TOKENS, WHOLE_BYTES, AnswerReader

USAGE = {"prompt_tokens": 5000, "completion_tokens": 700}
CHAT = "/v1/chat/completions"


def tokens(*parts: bytes, events: bool = False, path: str = CHAT) -> tuple[int, int]:
    reader = AnswerReader(path, "camera", hide_usage=False)
    assert b"".join(reader.read(part, events) for part in parts) == b"".join(parts)
    record = reader.to_record()
    return record.prompt_tokens, record.completion_tokens


def event(value: Any, end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(value).encode() + end


@pytest.mark.parametrize(
    "behind",
    [{}, {"metadata": {"usage": "x"}}, {"user": "usage"}, {"details": {"usage": None}}, {"a": {"usage": {"b": 1}}}],
)
@pytest.mark.parametrize("size", [10, WHOLE_BYTES * 2])
def test_what_an_application_has_echoed_hides_no_tokens(behind: dict[str, Any], size: int) -> None:
    text = json.dumps({"choices": [{"text": 'a "usage": {"prompt_tokens": 1}' + "b" * size}], "usage": USAGE, **behind})
    half = len(text) // 2
    assert tokens(text[:half].encode(), text[half:].encode()) == (5000, 700)


@pytest.mark.parametrize("echo", [{"input_tokens": 0, "output_tokens": 0}, {"prompt_tokens": 1}, {"a": {}}])
def test_the_highest_counts_hold(echo: dict[str, Any]) -> None:
    data = [{"embedding": [0.5] * 30_000}, {"embedding": [0.5] * 30_000}]
    assert tokens(json.dumps({"usage": USAGE, "data": data, "metadata": {"usage": echo}}).encode()) == (5000, 700)
    assert tokens(json.dumps({"metadata": {"usage": echo}, "data": data, "usage": USAGE}).encode()) == (5000, 700)


def test_what_is_no_json_is_searched() -> None:
    assert tokens(event({"choices": []}) + event({"usage": USAGE})) == (5000, 700)
    assert tokens(b'{"text": "a\nb", "usage": {"prompt_tokens": 3}}') == (3, 0)
    assert tokens(b'{"tools": ' + b"[" * 5000 + b"]" * 5000 + b', "usage": {"prompt_tokens": 3}}') == (3, 0)


def test_counts_that_grow_from_event_to_event() -> None:
    parts = [
        event({"choices": [{"delta": {"content": "a"}}], "usage": {"completion_tokens": one}}) for one in (1, 2, 3)
    ]
    assert tokens(*parts, event({"choices": [], "usage": {"prompt_tokens": 4}}), events=True) == (4, 3)


def test_an_event_that_came_in_pieces_tells_its_tokens_all_the_same() -> None:
    answer = {"type": "response.completed", "response": {"instructions": "x" * 400_000, "usage": {"input_tokens": 9}}}
    whole = event(answer)
    assert tokens(whole[:300_000], whole[300_000:], events=True, path="/v1/responses") == (9, 0)


@pytest.mark.parametrize("count", [-1, 10**400, 1.5, True, "7", None, float("nan"), MAX_TOKENS + 1, [1]])
def test_what_is_no_count_is_not_counted(count: Any) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 3}
    text = json.dumps({"choices": [], "usage": usage}) if count != 10**400 else "{" + "9" * 5000
    assert tokens(text.encode()) in ((0, 3), (0, 0))


def hidden(*events: bytes) -> bytes:
    reader = AnswerReader(CHAT, "camera", hide_usage=True)
    return b"".join(reader.read(one, True) for one in events)


def test_only_the_event_that_was_asked_for_here_is_hidden_and_only_its_usage() -> None:
    last = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    text = event({**last, "choices": [{"delta": {"content": "a"}}], "usage": None})
    comment, done = b": ping\n\n", b"data: [DONE]\n\n"
    assert hidden(comment, text, event({**last, "usage": USAGE}), done) == comment + text + done
    empty = {"index": 0, "delta": {}, "finish_reason": None}
    timings = event({**last, "choices": [empty], "timings": {"a": 1}})
    assert hidden(event({**last, "usage": USAGE, "timings": {"a": 1}})) == timings
    assert hidden(event({**last, "usage": USAGE, "error": {}})) == event({**last, "usage": USAGE, "error": {}})
    assert hidden(event({**last, "prompt_filter_results": []})) == event({**last, "prompt_filter_results": []})
    with_text = event({**last, "choices": [{"text": "a"}], "usage": USAGE})
    assert hidden(with_text) == with_text


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_pieces_count_where_no_tokens_are_told(end: bytes) -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"reasoning_content": "b"},
        {"tool_calls": [{"index": 0}]},
        {},
    ]
    parts = [event({"choices": [{"delta": delta}]}, end) for delta in deltas]
    assert tokens(b"".join(parts), events=True) == (0, 3)
