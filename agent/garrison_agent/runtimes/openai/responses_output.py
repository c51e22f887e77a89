"""The output of a response while it grows: its items, and the events that tell of it. Pure.

Source: OpenAI API reference, "Responses", "Streaming events".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from garrison_agent.runtimes.llama.generation import TokenLogprob
from garrison_agent.runtimes.openai.chat import call_id, shown_token
from garrison_agent.runtimes.openai.events import Json
from garrison_agent.runtimes.openai.tool_calls import CallPiece

Event = tuple[str, Json]


class Events:
    """Encodes the events of one stream; each gets the next ``sequence_number``."""

    def __init__(self) -> None:
        self._next = 0
        self._head = b""

    def encode(self, events: Iterable[Event]) -> bytes:
        """Return the bytes of ``events``."""
        out = b""
        for name, fields in events:
            body = {"type": name, "sequence_number": self._next, **fields}
            out += f"event: {name}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n".encode()
            self._next += 1
            self._head = b""
        return out

    def encode_text(self, text: str, place: Json) -> bytes:
        """Return the event that ``text`` was added at ``place``; of many in a row only text and number are encoded."""
        if not self._head:
            body = json.dumps({"type": _TEXT_DELTA, **place, "logprobs": []}, separators=(",", ":"))
            self._head = f"event: {_TEXT_DELTA}\ndata: {body[:-1]},".encode()
        quoted = encode_basestring_ascii(text)
        out = b'%b"sequence_number":%d,"delta":%b}\n\n' % (self._head, self._next, quoted.encode("ascii"))
        self._next += 1
        return out


_TEXT_DELTA = "response.output_text.delta"


class Output:
    """The items of one response. Each method returns the events for what it adds."""

    def __init__(self) -> None:
        self.items: list[Json] = []
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._open = False
        """Whether the last item still grows."""

    @property
    def text_place(self) -> Json | None:
        """Where text that comes now is added to; None: in an item that does not exist yet."""
        return self._place() if self._open and self.items[-1]["type"] == "message" else None

    def add_text(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[Event]:
        """Add text to the message, or begin one."""
        if self.text_place is None:
            yield from self.end_item("completed")
            yield from self._begin_message()
        self.extend(text)
        shown = [shown_token(token) for token in logprobs]
        self._logprobs += shown
        if text or shown:
            yield _TEXT_DELTA, {**self._place(), "delta": text, "logprobs": shown}

    def extend(self, text: str) -> None:
        """Add text to the message that grows; its event is the caller's to send."""
        self._texts.append(text)

    def add_call(self, piece: CallPiece) -> Iterator[Event]:
        """Add a piece of a function call."""
        if piece.name is not None:
            yield from self.end_item("completed")
            yield from self._begin_call(piece.name)
        item = self.items[-1]
        if piece.arguments:
            item["arguments"] += piece.arguments
            where = {"item_id": item["id"], "output_index": len(self.items) - 1}
            yield "response.function_call_arguments.delta", {**where, "delta": piece.arguments}

    def end_item(self, status: str) -> Iterator[Event]:
        """End the item that grows, if there is one."""
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        at = len(self.items) - 1
        if item["type"] == "message":
            text, self._texts = "".join(self._texts), []
            part = {"type": "output_text", "annotations": [], "logprobs": self._logprobs, "text": text}
            item["content"] = [part]
            place = {"item_id": item["id"], "output_index": at, "content_index": 0}
            yield "response.output_text.done", {**place, "text": text, "logprobs": self._logprobs}
            yield "response.content_part.done", {**place, "part": part}
            self._logprobs = []
        else:
            told = {"item_id": item["id"], "output_index": at, "name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", told
        yield "response.output_item.done", {"output_index": at, "item": dict(item)}

    def _begin_message(self) -> Iterator[Event]:
        item: Json = {
            "id": "msg_" + secrets.token_hex(16),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield from self._begin(item)
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        yield "response.content_part.added", {**self._place(), "part": part}

    def _begin_call(self, name: str) -> Iterator[Event]:
        item: Json = {
            "id": "fc_" + secrets.token_hex(16),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id(),
            "name": name,
            "arguments": "",
        }
        yield from self._begin(item)

    def _begin(self, item: Json) -> Iterator[Event]:
        self.items.append(item)
        self._open = True
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(item)}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
