"""llama.cpp as a batching backend. Imported by a verified worker only; importing it loads the native library.

Source: llama.h of the version inside llama-cpp-python. Every call here happens in the decode thread.
"""

from __future__ import annotations

import ctypes
import math
import platform
import secrets
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from garrison_agent.runtimes.batching import DecodeError, Options, Row, Sampler
from garrison_protocol.errors import InvalidError

BATCH_SIZE = 512
SCORED_ROWS = 64


def _drop(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Take a line of llama.cpp's log to nowhere."""


_SILENT = llama_cpp.llama_log_callback(_drop)
"""Module-global: a collected callback is called all the same, and crashes."""


class LlamaBackend:
    """One GGUF model in one context."""

    batch_size = BATCH_SIZE
    scored_rows = SCORED_ROWS

    def __init__(self, path: str, *, threads: int, context_length: int, parallel: int) -> None:
        """Load ``path``.

        Raises:
            InvalidError: ``model.load_failed``: not a GGUF file that this llama.cpp can run, or too little memory.
        """
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = not _has_amx()
        model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not model:
            raise InvalidError(
                "model.load_failed",
                "llama.cpp cannot load this GGUF file: damaged, cut short, or of an architecture it does not know",
                hint="check the package on a workstation, and that the agent's llama-cpp-python is recent enough",
            )
        self._model = model
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.parallel = parallel
        self.context_length = min(context_length, llama_cpp.llama_model_n_ctx_train(model))
        self._context = self._new_context(threads)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH_SIZE, 0, 1)
        self._pieces: dict[int, bytes] = {}
        self._piece_buffer = ctypes.create_string_buffer(512)
        begins = llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self.begin_text = self._special(llama_cpp.llama_vocab_bos(self._vocab))
        """The text of the token that begins a prompt, as chat templates write it."""
        self.begins_by_itself = bool(begins)
        """Whether ``tokenize`` adds that token."""
        self.end_text = self._special(llama_cpp.llama_vocab_eos(self._vocab))

    def _new_context(self, threads: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context_length * self.parallel
        params.n_seq_max = self.parallel
        params.n_batch = params.n_ubatch = BATCH_SIZE
        params.n_outputs_max = params.n_outputs_max_per_seq = max(SCORED_ROWS, self.parallel)
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True  # one pass over the weights serves all sequences, also when one of them pauses
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise InvalidError(
                "model.load_failed",
                f"llama.cpp cannot make a context of {self.parallel} x {self.context_length} tokens for this model",
                hint="lower runtime.context_length or runtime.parallel in agent.toml, or free memory",
            )
        return context

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template inside the file, if it has one."""
        template = llama_cpp.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    def facts(self) -> dict[str, Any]:
        """Return what the model is, for status and health."""
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, buffer, len(buffer))
        return {
            "description": buffer.value.decode("utf-8", "replace"),
            "parameter_count": llama_cpp.llama_model_n_params(self._model),
            "trained_context_length": llama_cpp.llama_model_n_ctx_train(self._model),
            "context_length": self.context_length,
            "parallel": self.parallel,
            "vocabulary": self._vocab_size,
            "chat_template": self.chat_template is not None,
        }

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``; the names of control tokens in it become those tokens."""
        data = text.encode()
        size = len(data) + 2  # a token is at least one byte, and the model may add two of its own
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, True, True)
        if count < 0:
            raise InvalidError("inference.prompt_unreadable", "the model's tokenizer does not take this text")
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; control tokens have none."""
        piece = self._pieces.get(token)
        if piece is None:
            size = llama_cpp.llama_token_to_piece(
                self._vocab, token, self._piece_buffer, len(self._piece_buffer), 0, False
            )
            piece = self._pieces[token] = self._piece_buffer.raw[: max(size, 0)]
        return piece

    def ends(self, token: int) -> bool:
        """Tell whether ``token`` ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def forget(self, sequence: int, start: int) -> bool:
        """Drop what is known of ``sequence`` from position ``start`` on."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def decode(self, rows: Sequence[Row]) -> None:
        """Read ``rows``, at most ``batch_size``.

        Raises:
            DecodeError: llama.cpp refused the batch.
        """
        batch = self._batch
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        batch.n_tokens = len(rows)
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise DecodeError(f"llama_decode returned {code} for {len(rows)} tokens")

    def sampler(self, options: Options) -> Sampler:
        """Return llama.cpp's sampler chain for ``options``."""
        return _LlamaSampler(self._context, options, vocab_size=self._vocab_size, window=self.context_length)

    def log_probability(self, row: int, token: int) -> float:
        """Return the natural logarithm of the probability of ``token`` after ``row``; NaN if there is none."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        logits = np.ctypeslib.as_array(pointer, (self._vocab_size,)).astype(np.float64)
        highest = float(logits.max())
        if not math.isfinite(highest):
            return math.nan
        return float(logits[token]) - highest - math.log(float(np.exp(logits - highest).sum()))

    def _special(self, token: int) -> str:
        if token < 0:
            return ""
        size = llama_cpp.llama_token_to_piece(self._vocab, token, self._piece_buffer, len(self._piece_buffer), 0, True)
        return self._piece_buffer.raw[: max(size, 0)].decode("utf-8", "replace")


class _LlamaSampler:
    """A sampler chain of one answer. Penalties count its last ``window`` tokens, the prompt's excluded."""

    def __init__(self, context: Any, options: Options, *, vocab_size: int, window: int) -> None:
        self._context = context
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        assert chain is not None
        self._chain: Any = chain
        if options.presence_penalty or options.frequency_penalty:
            penalties = (1.0, options.frequency_penalty, options.presence_penalty)
            self._add(llama_cpp.llama_sampler_init_penalties(vocab_size, window, *penalties))
        if options.temperature <= 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        self._add(llama_cpp.llama_sampler_init_top_k(options.top_k))
        self._add(llama_cpp.llama_sampler_init_top_p(options.top_p, 1))
        self._add(llama_cpp.llama_sampler_init_min_p(options.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(options.temperature))
        seed = secrets.randbits(32) if options.seed is None else options.seed
        # 0xFFFFFFFF means "random" to llama.cpp; an asked-for seed never does.
        self._add(llama_cpp.llama_sampler_init_dist((seed & 0xFFFFFFFF) % 0xFFFFFFFF))

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, row: int) -> int:
        """Return the token that follows ``row`` of the last batch, and remember it for the penalties."""
        return int(llama_cpp.llama_sampler_sample(self._chain, self._context, row))

    def close(self) -> None:
        """Free the chain."""
        llama_cpp.llama_sampler_free(self._chain)
        self._chain = None


def _has_amx() -> bool:
    """Tell whether llama.cpp would repack weights for AMX here.

    Its AMX kernels crash on prompts (Q4_1: always; ggml-org/llama.cpp#20824), so such machines run on AVX-512.
    Elsewhere repacking is wanted: on ARM it makes Q4_0 several times faster.
    """
    if platform.machine() != "x86_64":
        return False
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as cpuinfo:
        return any(line.startswith("flags") and "amx_int8" in line.split() for line in cpuinfo)
