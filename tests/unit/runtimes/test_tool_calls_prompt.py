from __future__ import annotations

from typing import Any

from garrison_agent.runtimes.openai.tool_calls import CallParser, CallPiece
from garrison_agent.runtimes.openai.tool_calls_prompt import with_tools_in_words

TOOL = {"type": "function", "function": {"name": "f", "description": "Größe"}}
USER = {"role": "user", "content": "hello"}


def test_without_tools_a_conversation_stays_as_it_is() -> None:
    assert with_tools_in_words([USER], []) == [USER]


def test_tools_are_told_in_the_system_message() -> None:
    (system, user) = with_tools_in_words([USER], [TOOL])
    assert system["role"] == "system"
    assert '"description": "Größe"' in system["content"]
    assert user == USER
    (system, _) = with_tools_in_words([{"role": "system", "content": "Be brief."}, USER], [TOOL])
    assert system["content"].startswith("Be brief.\n\n")
    assert "Größe" in system["content"]


def test_calls_and_their_results_become_text_that_is_read_as_calls() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
    ]
    _, said, result = with_tools_in_words(turns, [])
    assert result == {"role": "user", "content": "<tool_response>\n42\n</tool_response>"}
    assert CallParser(["f"]).push(said["content"]) == [CallPiece(0, "f", ""), CallPiece(0, None, '{"a": 1}')]
