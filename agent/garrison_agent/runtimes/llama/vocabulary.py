"""The tokens of a GGUF model, by llama.cpp. Every call happens in the decode thread."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

import llama_cpp

from garrison_protocol.errors import InvalidError

_PIECE_BYTES = 512


class LlamaVocabulary:
    """Text to tokens and back."""

    def __init__(self, model: Any) -> None:
        self.native: Any = llama_cpp.llama_model_get_vocab(model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.native)
        self._buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        self._pieces: dict[int, bytes] = {}
        self._names: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}
        begin, end = llama_cpp.llama_vocab_bos(self.native), llama_cpp.llama_vocab_eos(self.native)
        self.begin_text = self.name(begin).decode("utf-8", "replace") if begin >= 0 else ""
        """The text of the token that begins a prompt, as chat templates write it."""
        self.end_text = self.name(end).decode("utf-8", "replace") if end >= 0 else ""
        self.begins_by_itself = bool(llama_cpp.llama_vocab_get_add_bos(self.native))
        """Whether ``tokenize`` adds the token that begins a prompt."""

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``; the names of control tokens in it become those tokens."""
        data = text.encode()
        size = len(data) + 2  # a token is at least one byte, and the model may add two of its own
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self.native, data, len(data), buffer, size, True, True)
        if count < 0:
            raise InvalidError("inference.prompt_unreadable", "the model's tokenizer does not take this text")
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; control tokens have none."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read(token, named=False)
        return piece

    def name(self, token: int) -> bytes:
        """Return the bytes of ``token``; of a control token, those of its name."""
        name = self._names.get(token)
        if name is None:
            name = self._names[token] = self._read(token, named=True)
        return name

    def ends(self, token: int) -> bool:
        """Tell whether ``token`` ends an answer."""
        ends = self._ends.get(token)
        if ends is None:
            ends = self._ends[token] = bool(llama_cpp.llama_vocab_is_eog(self.native, token))
        return ends

    @cached_property
    def longest(self) -> int:
        """The bytes of the longest token."""
        return max(len(self._read(token, named=True)) for token in range(self.size))

    @cached_property
    def of_bytes(self) -> dict[bytes, int]:
        """The tokens that are a single byte; models have one for every byte, or nearly."""
        names = ((self._read(token, named=True), token) for token in range(self.size))
        return {name: token for name, token in names if len(name) == 1}

    def _read(self, token: int, *, named: bool) -> bytes:
        size = llama_cpp.llama_token_to_piece(self.native, token, self._buffer, len(self._buffer), 0, named)
        return self._buffer.raw[: max(size, 0)]
