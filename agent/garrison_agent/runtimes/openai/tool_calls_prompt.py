"""Tools for models whose chat template knows none: told in words, called and answered as text. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from garrison_agent.runtimes.openai.tool_calls import CLOSE_TAG, OPEN_TAG

_HOW = """\
You may call functions to answer the user. Each line between <tools> and </tools> describes one:
<tools>
{tools}
</tools>
To call a function, write nothing but its name and arguments as JSON, like this:
{open_tag}
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
{close_tag}
The result comes back between <tool_response> and </tool_response>."""


def with_tools_in_words(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation of plain texts that says the same as ``turns`` with ``tools`` do."""
    told = [_in_words(turn) for turn in turns]
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    how = _HOW.format(tools=listed, open_tag=OPEN_TAG, close_tag=CLOSE_TAG)
    if told and told[0]["role"] in ("system", "developer"):
        told[0] = {**told[0], "content": told[0]["content"] + "\n\n" + how}
    else:
        told.insert(0, {"role": "system", "content": how})
    return told


def _in_words(turn: Mapping[str, Any]) -> dict[str, Any]:
    content = turn["content"]
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [_call(call["function"]) for call in turn.get("tool_calls", ())]
    return {"role": turn["role"], "content": "\n".join([*([content] if content else []), *calls])}


def _call(function: Mapping[str, Any]) -> str:
    body = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"{OPEN_TAG}\n{body}\n{CLOSE_TAG}"
