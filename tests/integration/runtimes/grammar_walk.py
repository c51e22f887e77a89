"""A text, or chance, led through llama.cpp's own grammar sampler over SmolLM2's vocabulary."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from garrison_agent.runtimes.llama.model import _SILENT


class Vocabulary:
    """The vocabulary of a GGUF file, without its weights."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model
        self.handle: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.handle)
        self.end = llama_cpp.llama_vocab_eos(self.handle)
        self.pieces = [self._piece(token) for token in range(self.size)]
        self.closing = [token for letter in '"]}' for token in self.tokens(letter)]
        self.short = [token for token, piece in enumerate(self.pieces) if 0 < len(piece) <= 3]

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_token_to_piece(self.handle, token, buffer, 256, 0, False)
        return buffer.raw[: max(0, size)]

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 2))()
        count = llama_cpp.llama_tokenize(self.handle, data, len(data), buffer, len(buffer), False, False)
        assert count >= 0
        return [int(token) for token in buffer[:count]]

    @contextmanager
    def sampler(self, grammar: str) -> Iterator[Walk]:
        """A sampler at the grammar's beginning; fails if llama.cpp does not take the grammar."""
        sampler = llama_cpp.llama_sampler_init_grammar(self.handle, grammar.encode(), b"root")
        assert sampler, f"llama.cpp refuses this grammar:\n{grammar}"
        try:
            yield Walk(self, sampler)
        finally:
            llama_cpp.llama_sampler_free(sampler)

    def accepts(self, grammar: str, text: str) -> bool:
        """Tell whether ``text`` is a whole answer under ``grammar``."""
        with self.sampler(grammar) as walk:
            for token in self.tokens(text):
                if not walk.allowed([token]):
                    return False
                walk.accept(token)
            return bool(walk.allowed([self.end]))

    def wander(self, grammar: str, seed: int, *, limit: int = 160) -> str | None:
        """Return a text that chance makes under ``grammar``, None if it has no end after ``limit`` tokens."""
        chance = random.Random(seed)
        text = b""
        with self.sampler(grammar) as walk:
            for count in range(limit):
                # Short pieces reach every corner of a grammar; the end is offered every time, closing more and more.
                offered = [*chance.sample(self.short, 60), *self.closing, self.end]
                allowed = walk.allowed(offered)
                if not allowed:
                    allowed = walk.allowed([*self.short, self.end])
                assert allowed, f"a dead end after {text!r}"
                closing = [token for token in allowed if token == self.end or token in self.closing]
                token = chance.choice(closing if closing and count > limit // 6 else allowed)
                if token == self.end:
                    return text.decode()
                walk.accept(token)
                text += self.pieces[token]
        return None


class Walk:
    def __init__(self, vocabulary: Vocabulary, sampler: Any) -> None:
        self._vocabulary = vocabulary
        self._sampler = sampler

    def allowed(self, tokens: list[int]) -> list[int]:
        """Return those of ``tokens`` that may follow."""
        data = (llama_cpp.llama_token_data * len(tokens))()
        for entry, token in zip(data, tokens, strict=True):
            entry.id, entry.logit, entry.p = token, 0.0, 0.0
        array = llama_cpp.llama_token_data_array(data, len(tokens), -1, False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return [int(entry.id) for entry in data if np.isfinite(entry.logit)]

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self._sampler, token)
