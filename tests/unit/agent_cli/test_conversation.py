from __future__ import annotations

import json
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.conversation import Answer, Conversation, ask, parse_parameter, read_schema
from garrison_protocol.errors import InvalidError, UnavailableError


class Scripted(AgentClient):
    """Streams what it was told; remembers whether the stream was closed, which is what stops a model."""

    def __init__(self, *events: dict[str, Any] | BaseException) -> None:
        super().__init__(Path("nowhere"))
        self.events = events
        self.asked: list[Any] = []
        self.closed = False

    def stream(self, place: str, body: object) -> Generator[dict[str, Any], None, None]:
        self.asked.append((place, body))
        try:
            for event in self.events:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.closed = True


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def test_an_answer_is_filled_and_shown_as_it_comes() -> None:
    totals = {"usage": {"prompt_tokens": 7, "completion_tokens": 2}, "timings": {"ttft_ms": 40, "tokens_per_s": 12.34}}
    client, answer, shown = (
        Scripted(piece("Hel"), piece("lo", "stop"), {"choices": [], **totals}),
        Answer(),
        list[str](),
    )
    ask(client, {}, answer, [shown.append])
    assert (answer.text, answer.finish, shown) == ("Hello", "stop", ["Hel", "lo"])
    assert answer.speed == "2 tokens, 12.3 tok/s, first token after 0.04 s, prompt 7 tokens"


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), UnavailableError("worker.died", "gone")])
def test_what_came_before_an_early_end_stays_and_the_model_is_stopped(ending: BaseException) -> None:
    client, answer = Scripted(piece("half"), ending), Answer()
    with pytest.raises(type(ending)):
        ask(client, {}, answer, [])
    assert (answer.text, answer.finish, client.closed) == ("half", None, True)


def test_a_stop_while_text_is_shown_stops_the_model_too() -> None:
    client = Scripted(piece("one"), piece("two"))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(client, {}, Answer(), [interrupt])
    assert client.closed


def test_a_request_holds_all_that_was_said_and_set() -> None:
    talk = Conversation("chat", system="Be brief.", schema={"type": "object"})
    talk.set("temperature", "0")
    talk.set("seed", "7")
    talk.heard("Hi", "Hello")
    body = talk.request("And now?")
    assert [(turn["role"], turn["content"]) for turn in body["messages"]] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "And now?"),
    ]
    assert (body["model"], body["temperature"], body["seed"], body["stream"]) == ("chat", 0, 7, True)
    assert body["stream_options"] == {"include_usage": True}
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    talk.set("seed", "default")
    assert "seed" not in talk.request("x")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "2.1"),
        ("temperature", "nan"),
        ("temperature", "warm"),
        ("top_p", "0"),
        ("seed", "1.5"),
        ("seed", "-1"),
        ("max_tokens", "0"),
        ("colour", "1"),
    ],
)
def test_parameters_out_of_range(name: str, text: str) -> None:
    with pytest.raises(InvalidError, match=r"cli\.parameter_invalid"):
        parse_parameter(name, text)


def test_a_conversation_is_kept_for_its_owner_alone_and_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.touch(0o644)
    talk = Conversation("chat", system="Be kind.", parameters={"temperature": 0.5})
    talk.heard("Grüß", "Gott")
    talk.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = Conversation("chat", messages=[])
    other.load(path)
    assert (other.system, other.parameters, other.messages) == (talk.system, talk.parameters, talk.messages)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"format": "other/1"}',
        b'{"format": "garrison-conversation/1", "messages": [{"role": "root", "content": "x"}]}',
        b'{"format": "garrison-conversation/1", "parameters": {"temperature": 99}}',
        b'{"format": "garrison-conversation/1", "parameters": {"n": 99}}',
        b'{"format": "garrison-conversation/1", "system": 7}',
    ],
)
def test_what_is_no_conversation_changes_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    talk = Conversation("chat", system="Stay.")
    with pytest.raises(InvalidError, match=r"cli\.conversation_malformed"):
        talk.load(path)
    assert talk == Conversation("chat", system="Stay.")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"cli\.file_unusable"):
        Conversation("chat").save(tmp_path)
    with pytest.raises(InvalidError, match=r"cli\.file_unusable"):
        Conversation("chat").load(tmp_path / "none")
    with pytest.raises(InvalidError, match=r"cli\.file_unusable"):
        read_schema(tmp_path / "none")
    schema = tmp_path / "schema.json"
    for text in ("{", "[1]", '"x"'):
        schema.write_text(text)
        with pytest.raises(InvalidError, match=r"cli\.file_unusable"):
            read_schema(schema)
    schema.write_text(json.dumps({"type": "object"}))
    assert read_schema(schema) == {"type": "object"}
