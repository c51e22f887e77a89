"""From what a model writes to text and tool calls, while it writes. Pure; the text is a stranger's.

Understood wherever they stand in an answer:

- ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen, and the form that
  ``tool_calls_prompt`` teaches a model whose template knows no tools;
- ``{"name": ..., "parameters": {...}}``, bare: Llama 3, and answers that a grammar holds to a call;
- a list of such objects, with or without ``[TOOL_CALLS]`` before it: Mistral (the mark is a control token there, of
  which answers hold nothing).

A bare object is a call only if it begins with the name of a tool that was offered, then its arguments; any other JSON
is text. Arguments are passed on as they come. Text that may still become a call is held back, so that no part of a call
is ever given as text; a call that is cut short is no call, and no text either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from enum import Enum
from typing import Any, NamedTuple

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"
LIST_MARK = "[TOOL_CALLS]"
_MARKS = (OPEN_TAG, LIST_MARK)
_SPACE = re.compile(r"\s*")
_MAX_SPACE = 64
"""More blanks than that within the beginning of a call are none: what waits for its end stays short."""
_BEGINNING = re.compile(r"[{\[<]")
_STRING = re.compile(r'"[^"\\\x00-\x1f]*"')
_MAX_NAME = 128


class CallPiece(NamedTuple):
    """A part of call ``number``, counted from 0.

    ``name`` stands in its first piece only; ``arguments`` of all pieces together are the JSON text of an object.
    """

    number: int
    name: str | None
    arguments: str


class _Where(Enum):
    TEXT = "text"
    BLOCK = "inside a tag, before its object"
    WHOLE = "inside a tag, in an object that is read at its end"
    ARGUMENTS = "arguments"
    REST = "behind the arguments, within the call's object"
    BEHIND = "behind the call's object"


class _MoreError(Exception):
    """The text ends before it can be told."""


class _OtherError(Exception):
    """This is no call."""


class _Head(NamedTuple):
    name: str
    end: int
    """Where the arguments begin."""
    listed: bool


class CallParser:
    """Reads one answer. ``complete`` counts the calls that came to their end."""

    def __init__(self, names: Collection[str]) -> None:
        self.complete = 0
        self._names = names
        self._where = _Where.TEXT
        self._buffer = ""
        self._depth = _Depth()
        self._begun = 0
        self._listed = False
        self._tagged = False
        self._spoke = False
        """Whether text was given since the beginning, or since the last call."""

    def push(self, text: str) -> list[str | CallPiece]:
        """Add what the model wrote; return the text and the pieces of calls that are now certain."""
        self._buffer += text
        return list(self._read())

    def finish(self) -> list[str | CallPiece]:
        """Return what was held back, once no more text comes."""
        rest, self._buffer = self._buffer, ""
        if self._where is _Where.TEXT:
            # Blanks around calls are layout.
            return [rest] if rest.strip() or (rest and not self._begun) else []
        if self._where in (_Where.BLOCK, _Where.WHOLE):
            return list(self._whole_call(rest))
        return []

    def _read(self) -> Iterator[str | CallPiece]:
        moved = True
        while moved and self._buffer:
            before = self._where, len(self._buffer)
            match self._where:
                case _Where.TEXT:
                    yield from self._read_text()
                case _Where.BLOCK:
                    yield from self._read_block()
                case _Where.WHOLE:
                    yield from self._read_whole()
                case _Where.ARGUMENTS:
                    yield from self._read_arguments()
                case _Where.REST:
                    self._read_rest()
                case _Where.BEHIND:
                    self._read_behind()
            moved = before != (self._where, len(self._buffer))

    def _read_text(self) -> Iterator[str | CallPiece]:
        """Give what is text up to the next call, or to what may become one."""
        buffer = self._buffer
        certain = len(buffer)
        for found in _BEGINNING.finditer(buffer):
            at = found.start()
            mark = next((mark for mark in _MARKS if buffer.startswith(mark, at)), None)
            if mark is not None:
                yield from self._say(at, at + len(mark))
                self._where, self._tagged, self._listed = _Where.BLOCK, mark == OPEN_TAG, False
                return
            if len(buffer) - at < _LONGEST_MARK and any(mark.startswith(buffer[at:]) for mark in _MARKS):
                certain = at
                break
            if found.group() == "<":
                continue
            try:
                head = _head(buffer, at, self._names)
            except _MoreError:
                certain = at
                break
            except _OtherError:
                continue
            yield from self._say(at, head.end)
            self._tagged = False
            yield self._begin(head)
            return
        if self._spoke or not buffer[:certain].isspace():
            yield from self._say(certain, certain)

    def _say(self, end: int, rest: int) -> Iterator[str]:
        """Give the buffer up to ``end`` unless it is blank before or between calls; go on at ``rest``."""
        text, self._buffer = self._buffer[:end], self._buffer[rest:]
        if text and (self._spoke or not text.isspace()):
            self._spoke = True
            yield text

    def _begin(self, head: _Head) -> CallPiece:
        self._where, self._depth, self._spoke = _Where.ARGUMENTS, _Depth(), False
        self._listed = self._listed or head.listed
        self._begun += 1
        return CallPiece(self._begun - 1, head.name, "")

    def _read_block(self) -> Iterator[CallPiece]:
        """Find out how the object of a marked call begins."""
        at = _SPACE.match(self._buffer).end()  # type: ignore[union-attr] # it matches everywhere
        try:
            head = _head(self._buffer, at, self._names)
        except _MoreError:
            return
        except _OtherError:
            self._where = _Where.WHOLE
            return
        self._buffer = self._buffer[head.end :]
        yield self._begin(head)

    def _read_whole(self) -> Iterator[str | CallPiece]:
        """Wait for the end of a call whose object begins with something else than its name."""
        end = self._buffer.find(CLOSE_TAG) if self._tagged else -1
        if end < 0:
            return
        block, self._buffer = self._buffer[:end], self._buffer[end + len(CLOSE_TAG) :]
        self._where = _Where.TEXT
        pieces = list(self._whole_call(block))
        if not pieces:  # not a call, as far as anyone can tell: what the model wrote, as it wrote it
            self._spoke = True
            yield OPEN_TAG + block + CLOSE_TAG
        yield from pieces

    def _whole_call(self, block: str) -> Iterator[CallPiece]:
        """Give the calls that ``block`` holds as complete JSON; nothing if it is something else."""
        try:
            value = json.loads(block)
        except (ValueError, RecursionError):
            return
        for call in value if isinstance(value, list) else [value]:
            named = _named(call, self._names)
            if named is not None:
                self._begun += 1
                self.complete += 1
                self._spoke = False
                yield CallPiece(self._begun - 1, *named)

    def _read_arguments(self) -> Iterator[CallPiece]:
        end = self._depth.end(self._buffer)
        text = self._buffer if end is None else self._buffer[:end]
        self._buffer = self._buffer[len(text) :]
        if end is not None:
            self._where, self._depth = _Where.REST, _Depth(1)
        yield CallPiece(self._begun - 1, None, text)

    def _read_rest(self) -> None:
        """Skip what stands behind the arguments, to the end of the call's object."""
        end = self._depth.end(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self.complete += 1
            self._where = _Where.BEHIND

    def _read_behind(self) -> None:
        """Skip what closes a call, or divides it from the next one."""
        rest = self._buffer.lstrip()
        if not rest:
            return
        self._where = _Where.TEXT
        if self._tagged:
            if len(rest) < len(CLOSE_TAG) and CLOSE_TAG.startswith(rest):
                self._where = _Where.BEHIND
                return
            rest = rest.removeprefix(CLOSE_TAG)
        elif self._listed and rest[0] == ",":
            self._where, rest = _Where.BLOCK, rest[1:]
        elif self._listed and rest[0] == "]":
            self._listed, rest = False, rest[1:]
        elif rest[0] == ";":  # how Llama 3 divides calls
            rest = rest[1:]
        self._buffer = rest


_LONGEST_MARK = max(map(len, _MARKS))


class _Depth:
    """Follows JSON text to the end of the object that it is in."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Return where the object ends within ``text``, which continues what came before; None: not here."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _IN_VALUE).search(text, at)
            if found is None:
                return None
            at = found.end()
            match found.group():
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._escaped = True
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None


_IN_STRING = re.compile(r'["\\]')
_IN_VALUE = re.compile(r'["{}\[\]]')


class _Cursor:
    """Reads tokens of JSON that may not have come completely."""

    def __init__(self, text: str, at: int) -> None:
        self._text = text
        self.at = at

    def peek(self) -> str:
        """Return the next character that is no blank."""
        end = _SPACE.match(self._text, self.at).end()  # type: ignore[union-attr] # it matches everywhere
        if end - self.at > _MAX_SPACE:
            raise _OtherError
        self.at = end
        if end == len(self._text):
            raise _MoreError
        return self._text[end]

    def take(self, character: str) -> None:
        """Go past ``character``."""
        if self.peek() != character:
            raise _OtherError
        self.at += 1

    def string(self, allowed: Collection[str]) -> str:
        """Go past one of the ``allowed`` strings, which need no escapes, and return it."""
        self.peek()
        found = _STRING.match(self._text, self.at)
        if found is not None and found.group()[1:-1] in allowed:
            self.at = found.end()
            return found.group()[1:-1]
        rest = self._text[self.at : self.at + _MAX_NAME]
        if found is None and any(f'"{one}"'.startswith(rest) for one in allowed):
            raise _MoreError
        raise _OtherError


def _head(text: str, at: int, names: Collection[str]) -> _Head:
    """Return how the call at ``at`` begins.

    Raises:
        _MoreError: It may be one, but ``text`` ends too early.
        _OtherError: It is none.
    """
    cursor = _Cursor(text, at)
    listed = cursor.peek() == "["
    if listed:
        cursor.take("[")
    cursor.take("{")
    if cursor.string(("name", "type")) == "type":
        cursor.take(":")
        cursor.string(("function",))
        cursor.take(",")
        cursor.string(("name",))
    cursor.take(":")
    name = cursor.string(names)
    cursor.take(",")
    cursor.string(("arguments", "parameters"))
    cursor.take(":")
    if cursor.peek() != "{":
        raise _OtherError
    return _Head(name, cursor.at, listed)


def _named(call: object, names: Collection[str]) -> tuple[str, str] | None:
    """Return name and arguments of a call in any order of its fields; None if it is none."""
    if not isinstance(call, dict):
        return None
    inner = call.get("function")
    told: dict[str, Any] = inner if isinstance(inner, dict) else call
    name, arguments = told.get("name"), told.get("arguments", told.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
