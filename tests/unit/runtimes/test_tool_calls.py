from __future__ import annotations

import json

import pytest

from garrison_agent.runtimes.openai.tool_calls import CallParser, CallPiece

NAMES = ("get_weather", "f")


def told(text: str, size: int | None = None) -> tuple[str, list[tuple[str, object]]]:
    """Return the text and the complete calls of an answer that comes in pieces of ``size``."""
    parser = CallParser(NAMES)
    size = size or max(1, len(text))
    items = [item for at in range(0, len(text), size) for item in parser.push(text[at : at + size])]
    items += parser.finish()
    calls: list[tuple[str, str]] = []
    for item in items:
        if isinstance(item, CallPiece):
            if item.name is not None:
                assert item.number == len(calls)
                calls.append((item.name, ""))
            calls[item.number] = (calls[item.number][0], calls[item.number][1] + item.arguments)
    said = "".join(item for item in items if isinstance(item, str))
    return said, [(name, json.loads(arguments)) for name, arguments in calls[: parser.complete]]


CASES = {
    "plain": ("Hello {world} <b>", "Hello {world} <b>", []),
    "tagged": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        "",
        [("f", {"a": 1})],
    ),
    "text before": ('Let me see.\n<tool_call>{"name":"f","arguments":{}}</tool_call>', "Let me see.\n", [("f", {})]),
    "text behind": ('<tool_call>{"name":"f","arguments":{}}</tool_call> Done.', " Done.", [("f", {})]),
    "two tagged": (
        '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>\n<tool_call>{"name":"f","arguments":{"a":2}}</tool_call>',
        "",
        [("f", {"a": 1}), ("f", {"a": 2})],
    ),
    "braces in strings": (
        '<tool_call>{"name":"f","arguments":{"a":"}]</tool_call>\\"{"}}</tool_call>',
        "",
        [("f", {"a": '}]</tool_call>"{'})],
    ),
    "other order": ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", {"a": 1})]),
    "wrapped function": (
        '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}</tool_call>',
        "",
        [("f", {"a": 1})],
    ),
    "arguments as text": ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
    "more fields": ('<tool_call>{"name":"f","arguments":{"a":1},"id":"}"}</tool_call>', "", [("f", {"a": 1})]),
    "no closing tag": ('<tool_call>{"name":"f","arguments":{"a":1}}', "", [("f", {"a": 1})]),
    "no closing tag, other order": ('<tool_call>{"arguments":{"a":1},"name":"f"}', "", [("f", {"a": 1})]),
    "llama": ('{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    "llama with type": ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    "llama, two": ('{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}', "", [("f", {}), ("f", {})]),
    "mistral": (
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]',
        "",
        [("f", {"a": 1}), ("get_weather", {})],
    ),
    "mistral, mark dropped": ('[{"name": "f", "arguments": {"a": 1}}]', "", [("f", {"a": 1})]),
    "a name that is not offered": ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
    "an answer of JSON": ('{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
    "not JSON inside tags": ("<tool_call>nothing</tool_call>!", "<tool_call>nothing</tool_call>!", []),
    "unknown inside tags": (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    "list inside tags is no object": (
        '<tool_call>{"name": ["f"]}</tool_call>',
        '<tool_call>{"name": ["f"]}</tool_call>',
        [],
    ),
    "cut in the mark": ("Look: <tool_c", "Look: <tool_c", []),
    "cut in a call": ('<tool_call>{"name": "f", "arguments": {"a": "lo', "", []),
    "cut before its name": ('Now. <tool_call>{"na', "Now. ", []),
    "blank": (" \n", " \n", []),
    "blank around": ('\n\n{"name":"f","parameters":{}}\n', "", [("f", {})]),
    "leading blanks stay": ("  Yes.", "  Yes.", []),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", [None, 1, 2, 5])
def test_calls_and_text_come_apart_however_the_answer_comes(case: str, size: int | None) -> None:
    text, said, calls = CASES[case]
    assert told(text, size) == (said, calls)


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = CallParser(NAMES)
    assert parser.push('<tool_call>{"name": "f", ') == []
    assert parser.push('"arguments": {"a": "lo') == [CallPiece(0, "f", ""), CallPiece(0, None, '{"a": "lo')]
    assert parser.push("ng") == [CallPiece(0, None, "ng")]
    assert parser.complete == 0
    assert parser.push('"}}') == [CallPiece(0, None, '"}')]
    assert parser.complete == 1


def test_text_is_passed_on_as_it_comes() -> None:
    parser = CallParser(NAMES)
    assert parser.push("One ") == ["One "]
    assert parser.push("two {") == ["two "]
    assert parser.push("x") == ["{x"]


def test_what_waits_for_the_beginning_of_a_call_is_short() -> None:
    parser = CallParser(NAMES)
    text = "x{" + " " * 100
    assert "".join(map(str, parser.push(text))) == text


def test_nothing_of_a_call_is_ever_text() -> None:
    """At whatever place the answer is cut."""
    text = 'Well. <tool_call>\n{"name": "f", "arguments": {"a": "}"}}\n</tool_call>'
    for end in range(len(text)):
        said, _ = told(text[:end], 1)
        assert said == text[: min(end, 6)] or said == text[:end].rstrip() or text[6:].startswith(said[6:])
        assert '"name"' not in said


@pytest.mark.parametrize(
    "text",
    [
        "{" * 200_000,
        "<tool_call>" + "{" * 200_000,
        "<" * 200_000,
        '{"name"' * 40_000,
        "[" * 100_000 + '{"name": "f"',
        "{" + " " * 200_000,
        "<tool_call>" + " " * 100_000,
        '<tool_call>{"a":' + "[" * 100_000 + "</tool_call>",
    ],
)
def test_hostile_text_ends(text: str) -> None:
    said, calls = told(text)
    assert calls == []
    assert said in (text, "")
    told(text[:3000], 1)
