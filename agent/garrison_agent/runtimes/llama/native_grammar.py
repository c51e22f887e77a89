"""A grammar that an answer follows, by llama.cpp's grammar sampler. Every call happens in the decode thread.

llama.cpp ends the process if it is made to accept a token that does not fit (an exception through C, or an abort), so
no token is accepted before it was checked. For the same reason its own lazy grammar is not used: it would have to take
whatever stands behind a trigger in the same token. Here such a token is refused, and another one is chosen.
Source: src/llama-grammar.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import llama_cpp

from garrison_agent.runtimes.llama.vocabulary import LlamaVocabulary
from garrison_protocol.errors import InvalidError

MAX_BYTES = 128 * 1024
MAX_NESTING = 256
"""llama.cpp's parser and its search for left recursion call themselves as deep as a grammar goes."""


class LlamaGrammar:
    """What may come next. Without triggers it holds from the start."""

    def __init__(self, vocabulary: LlamaVocabulary, text: str, triggers: tuple[str, ...]) -> None:
        """Parse ``text``, whose first rule is ``root``.

        Raises:
            InvalidError: ``inference.grammar_invalid``.
        """
        self._vocabulary = vocabulary
        self._sampler = _parse(vocabulary, text)
        self._triggers = tuple(trigger.encode() for trigger in triggers)
        self._longest = max(map(len, self._triggers), default=0)
        self.waiting = bool(triggers)
        """Whether everything is allowed still, because no trigger has come."""
        self._heard: list[tuple[int, bytes]] = []
        """While waiting: the last tokens and their text, enough for the longest trigger."""
        self._one: Any = llama_cpp.llama_token_data()
        self._only = llama_cpp.llama_token_data_array(ctypes.pointer(self._one), 1, -1, False)

    def close(self) -> None:
        """Free the native grammar."""
        if self._sampler is not None:
            llama_cpp.llama_sampler_free(self._sampler)
            self._sampler = None

    def take(self, token: int) -> bool:
        """Go on with ``token``; False, and nothing has changed, if it does not fit."""
        if not self.waiting:
            return self._feed(self._sampler, token)
        heard = [*self._heard, (token, self._vocabulary.name(token))]
        start = self._trigger_at(b"".join(text for _, text in heard))
        if start is None:
            while len(heard) > 1 and sum(len(text) for _, text in heard[1:]) >= self._longest - 1:
                heard.pop(0)
            self._heard = heard
            return True
        follower = llama_cpp.llama_sampler_clone(self._sampler)
        if not self._replay(follower, heard, start):
            llama_cpp.llama_sampler_free(follower)
            return False
        self.close()
        self._sampler, self.waiting, self._heard = follower, False, []
        return True

    def mask(self, candidates: Any) -> None:
        """Give tokens that do not fit a logit of minus infinity; ``candidates`` is a ``llama_token_data_array``."""
        if not self.waiting:
            llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(candidates))

    def _feed(self, sampler: Any, token: int) -> bool:
        self._one.id, self._one.logit = token, 0.0
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self._only))
        if self._one.logit != 0.0:
            return False
        llama_cpp.llama_sampler_accept(sampler, token)
        return True

    def _trigger_at(self, text: bytes) -> int | None:
        found = [start for trigger in self._triggers if (start := text.find(trigger)) >= 0]
        return min(found, default=None)

    def _replay(self, sampler: Any, heard: list[tuple[int, bytes]], start: int) -> bool:
        """Feed what stands from ``start`` on in the text of ``heard``; the first token may begin before that."""
        end = 0
        for token, text in heard:
            begin, end = end, end + len(text)
            if begin >= start:
                if not self._feed(sampler, token):
                    return False
            elif end > start:
                of_bytes = self._vocabulary.of_bytes
                for byte in text[start - begin :]:
                    single = of_bytes.get(bytes([byte]))
                    if single is None or not self._feed(sampler, single):
                        return False
        return True


def _parse(vocabulary: LlamaVocabulary, text: str) -> Any:
    data = text.encode()
    if not data or len(data) > MAX_BYTES or b"\0" in data:
        raise _invalid(f"it has {len(data)} bytes; between 1 and {MAX_BYTES} are possible, without a zero byte")
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth > MAX_NESTING:
            raise _invalid(f"it is nested more than {MAX_NESTING} deep")
    with _no_standard_error():
        sampler = llama_cpp.llama_sampler_init_grammar(vocabulary.native, data, b"root")
    if not sampler:
        raise _invalid("llama.cpp does not accept it")
    return sampler


def _invalid(why: str) -> InvalidError:
    return InvalidError(
        "inference.grammar_invalid",
        f"the grammar made from the schema cannot be used: {why}",
        hint="simplify the schema",
    )


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
    """Keep llama.cpp's parser from printing the grammar, made of a client's schema, when it finds an error in it."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
