"""An answer in Ollama's words: what its lines hold, and how tool calls and log-probabilities look in them. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii
from typing import Any

from garrison_agent.runtimes.llama.generation import TokenLogprob
from garrison_agent.runtimes.openai.tool_calls import CallParser, CallPiece

_MARK = "@text@"


class Wording:
    """The lines of one answer. ``chat``: text is a message's content; otherwise it is the ``response``.

    With ``tools``, the names of those that may be called, calls are taken out of the text and told as such.
    """

    def __init__(self, model: str, *, chat: bool, tools: Iterable[str] = ()) -> None:
        self._model = model
        self._chat = chat
        names = frozenset(tools)
        self._parser = CallParser(names) if names else None
        self._calls: list[_Call] = []
        self._told = 0
        head, _, tail = self._line(_MARK, {}).rpartition(json.dumps(_MARK).encode())
        self._frame = head, tail

    def lines(self, text: str, logprobs: Sequence[TokenLogprob], *, last: bool) -> bytes:
        """Return the lines for what the answer grew by; ``last``: nothing more comes. No line says that it is done.

        Everything but the text of a line without further fields was encoded once, before the first.
        """
        said, calls = self.take(text, last=last)
        if not logprobs and not calls:
            head, tail = self._frame
            return head + encode_basestring_ascii(said).encode("ascii") + tail if said else b""
        return self._line(said, {"tool_calls": calls} if calls else {}, logprobs)

    def take(self, text: str, *, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Return what of the answer is text, and the calls that are complete now."""
        if self._parser is None:
            return text, []
        pieces = self._parser.push(text)
        if last:
            pieces += self._parser.finish()
        said = [piece for piece in pieces if isinstance(piece, str)]
        for piece in pieces:
            if isinstance(piece, CallPiece):
                self._add(piece)
        complete, self._told = self._calls[self._told : self._parser.complete], self._parser.complete
        calls = [call.told() for call in complete]
        return "".join(said), [call for call in calls if call is not None]

    def last(
        self,
        text: str,
        calls: Sequence[dict[str, Any]],
        logprobs: Sequence[TokenLogprob],
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the object that ends the answer: whatever was not told in lines, and ``facts`` about it."""
        more = {"tool_calls": list(calls)} if calls else {}
        body = self._object(text, more, done=True)
        if logprobs:
            body["logprobs"] = [_logprob(one) for one in logprobs]
        return {**body, **facts}

    def _add(self, piece: CallPiece) -> None:
        if piece.number == len(self._calls):
            self._calls.append(_Call(piece.name or ""))
        self._calls[piece.number].arguments += piece.arguments

    def _line(self, text: str, more: dict[str, Any], logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        body = self._object(text, more, done=False)
        if logprobs:
            body["logprobs"] = [_logprob(one) for one in logprobs]
        return line(body)

    def _object(self, text: str, more: dict[str, Any], *, done: bool) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text, **more}} if self._chat else {"response": text}
        return {"model": self._model, "created_at": _now(), **content, "done": done}


class _Call:
    """A tool call as it comes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arguments = ""

    def told(self) -> dict[str, Any] | None:
        """Return it in Ollama's form; None if its arguments are no object after all."""
        try:
            arguments = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return None
        return {"function": {"name": self.name, "arguments": arguments}} if isinstance(arguments, dict) else None


def line(value: dict[str, Any]) -> bytes:
    """Return a line of a stream."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    told = _token(one.piece, one.logprob)
    if one.top:
        told["top_logprobs"] = [_token(piece, logprob) for piece, logprob in one.top]
    return told


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
