"""llama.cpp as an embedding backend. Every call here happens in the embedding thread.

A model that looks both ways needs an input's tokens in one piece (``n_ubatch``), and llama.cpp pools them. One that
looks back only reads them in small pieces, and its vectors are pooled here: llama.cpp computes a model's logits for
every token that is pooled, and for a whole context of a large vocabulary they would take gigabytes.
Source: llama.h of the version inside llama-cpp-python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np

from garrison_agent.runtimes.embeddings.batching import EmbeddingError, Vector
from garrison_agent.runtimes.llama.model import describe, load_model, metadata
from garrison_agent.runtimes.spec import Settings
from garrison_protocol.errors import InvalidError

BATCH_SIZE = 512
"""Tokens of a batch of several inputs."""
PARALLEL = 32
_PIECE = 128
_POOLINGS = {
    "mean": llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    "cls": llama_cpp.LLAMA_POOLING_TYPE_CLS,
    "last": llama_cpp.LLAMA_POOLING_TYPE_LAST,
}
_NO_POOLING = str(llama_cpp.LLAMA_POOLING_TYPE_NONE)

_Row = tuple[int, int, int]
"""A token, its position, and its sequence."""


class LlamaEmbeddingBackend:
    """One GGUF model in one context that yields vectors."""

    parallel = PARALLEL

    def __init__(self, path: str, *, threads: int, context_length: int, settings: Settings) -> None:
        """Load ``path``. ``settings["pooling"]`` (mean, cls, last) wins over what the file says, mean being the last
        resort.

        Raises:
            InvalidError: ``model.load_failed``: not a GGUF file that can be run, or the pooling is not one of those.
        """
        self._model = load_model(path)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.context_length = min(context_length, llama_cpp.llama_model_n_ctx_train(self._model))
        self.batch_size = BATCH_SIZE
        self._capacity = max(self.context_length, BATCH_SIZE)
        self.dimensions = llama_cpp.llama_model_n_embd_out(self._model)
        self.pooling = self._pooling(settings)
        self._ends = bool(
            llama_cpp.llama_vocab_get_add_eos(self._vocab) or llama_cpp.llama_vocab_get_add_sep(self._vocab)
        )
        self._context = self._new_context(threads, pieces=True)
        self._pieces = bool(llama_cpp.llama_get_causal_attn(self._context))
        """Whether an input may be read in pieces."""
        if not self._pieces:
            llama_cpp.llama_free(self._context)
            self._context = self._new_context(threads, pieces=False)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(self._capacity, 0, 1)

    def _pooling(self, settings: Settings) -> str:
        asked = settings.get("pooling")
        if asked is not None:
            if asked not in _POOLINGS:
                raise InvalidError(
                    "model.load_failed",
                    f"model_settings: pooling is {asked!r}; it must be one of {', '.join(_POOLINGS)}",
                    hint="publish a version of the package with correct model_settings",
                )
            return str(asked)
        stated = metadata(self._model, f"{metadata(self._model, 'general.architecture')}.pooling_type")
        if stated is None or stated == _NO_POOLING:
            return "mean"
        for name, number in _POOLINGS.items():
            if stated == str(number):
                return name
        raise InvalidError(
            "model.load_failed",
            f"this model pools in a way ({stated}) that yields no embeddings: a ranker, for example",
            hint="use an embedding model, or set model_settings.pooling",
        )

    def _new_context(self, threads: int, *, pieces: bool) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.embeddings = True
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE if pieces else _POOLINGS[self.pooling]
        params.n_ctx = self._capacity
        params.n_batch = params.n_ubatch = _PIECE if pieces else self._capacity
        params.n_seq_max = self.parallel
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise InvalidError(
                "model.load_failed",
                f"llama.cpp cannot make an embedding context of {self._capacity} tokens for this model",
                hint="lower context_length in the manifest's model_settings, or free memory",
            )
        return context

    def facts(self) -> dict[str, Any]:
        """Return what the model is, for status and health."""
        return {
            "description": describe(self._model),
            "parameter_count": llama_cpp.llama_model_n_params(self._model),
            "trained_context_length": llama_cpp.llama_model_n_ctx_train(self._model),
            "context_length": self.context_length,
            "vocabulary": self.vocabulary,
            "dimensions": self.dimensions,
            "pooling": self.pooling,
        }

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``; the names of control tokens in it are plain text."""
        data = text.encode()
        size = len(data) + 4  # a token is at least one byte, and the model may add some of its own
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, True, False)
        if count < 0:
            raise InvalidError("inference.prompt_unreadable", "the model's tokenizer does not take this text")
        return list(buffer[:count])

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """Return the first ``context_length`` tokens, with the model's own ending, if it has one, kept."""
        if not self._ends:
            return list(tokens[: self.context_length])
        return [*tokens[: self.context_length - 1], tokens[-1]]

    def embed(self, inputs: Sequence[Sequence[int]], go_on: Callable[[], bool]) -> list[Vector] | None:
        """Return the pooled vector of each input, not normalised; None if ``go_on`` said no before a decode call.

        Raises:
            EmbeddingError: llama.cpp refused the batch.
        """
        if self._memory:
            llama_cpp.llama_memory_clear(self._memory, True)
        rows = [
            (token, position, sequence)
            for sequence, tokens in enumerate(inputs)
            for position, token in enumerate(tokens)
        ]
        if self._pieces:
            return self._pooled_here(rows, [len(tokens) for tokens in inputs], go_on)
        if not go_on():
            return None
        self._decode(rows)
        return [
            self._vector(llama_cpp.llama_get_embeddings_seq(self._context, sequence)) for sequence in range(len(inputs))
        ]

    def _pooled_here(
        self, rows: Sequence[_Row], lengths: Sequence[int], go_on: Callable[[], bool]
    ) -> list[Vector] | None:
        sums = np.zeros((len(lengths), self.dimensions), np.float64)
        for start in range(0, len(rows), _PIECE):
            if not go_on():
                return None
            piece = rows[start : start + _PIECE]
            self._decode(piece)
            for index, (_, position, sequence) in enumerate(piece):
                if self.pooling == "cls" and position > 0:
                    continue
                if self.pooling == "last" and position < lengths[sequence] - 1:
                    continue
                sums[sequence] += self._vector(llama_cpp.llama_get_embeddings_ith(self._context, index))
        if self.pooling == "mean":
            sums /= np.array(lengths)[:, None]
        return list(sums.astype(np.float32))

    def _decode(self, rows: Sequence[_Row]) -> None:
        batch = self._batch
        for index, (token, position, sequence) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = True
        batch.n_tokens = len(rows)
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise EmbeddingError(f"llama_decode returned {code} for {len(rows)} tokens")

    def _vector(self, pointer: Any) -> Vector:
        if not pointer:
            raise EmbeddingError("llama.cpp yields no vector for this model")
        return np.ctypeslib.as_array(pointer, (self.dimensions,)).astype(np.float32, copy=True)
