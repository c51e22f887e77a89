"""llama.cpp as a batching backend. Imported by a verified worker only; importing it loads the native library.

Source: llama.h of the version inside llama-cpp-python. Every call here happens in the decode thread.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from garrison_agent.runtimes.llama.backend import DecodeError, InterruptedDecodeError, Row, Sampler
from garrison_agent.runtimes.llama.generation import Options, TokenLogprob
from garrison_agent.runtimes.llama.lora import attach
from garrison_agent.runtimes.llama.model import describe, kv_bytes_per_token, load_model
from garrison_agent.runtimes.llama.sampler import Candidates, make_sampler
from garrison_agent.runtimes.llama.settings import DEFAULT_SETTINGS, LlamaSettings
from garrison_agent.runtimes.llama.vocabulary import LlamaVocabulary
from garrison_agent.runtimes.spec import OpenFile, Settings
from garrison_protocol.errors import InvalidError

SCORED_ROWS = 64
NO_LOGPROB = -9999.0
"""OpenAI's number for a token without a probability."""
_SURELY_SHORT = 64 * 1024
"""Characters: so many are tokenised in no time, whatever the context."""
_ABORTED = 2
_ASK_INTERRUPT = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.llama_cpp.ggml_abort_callback)
"""llama.cpp asks after every node of its graph whether to stop, a thousand times per token, so that must be native
code, and not wait for Python's lock. ``bool strlen(flag)`` is: 0 for an empty text, 1 for one of a single byte."""


class LlamaBackend:
    """One GGUF model in one context."""

    scored_rows = SCORED_ROWS

    def __init__(
        self,
        path: str,
        *,
        threads: int,
        context_length: int,
        parallel: int,
        settings: LlamaSettings = DEFAULT_SETTINGS,
        files: Sequence[OpenFile] = (),
        adapter_settings: Settings | None = None,
    ) -> None:
        """Load ``path``, with the LoRA adapter among ``files`` that ``adapter_settings`` may name (``lora.attach``).

        Raises:
            InvalidError: ``model.load_failed``: not a GGUF file that this llama.cpp can run, or too little memory.
        """
        model = load_model(path)
        self._model = model
        self._words = LlamaVocabulary(model)
        self.vocabulary = self._words.size
        self._candidates = Candidates(self.vocabulary)
        self.begin_text = self._words.begin_text
        self.begins_by_itself = self._words.begins_by_itself
        self.end_text = self._words.end_text
        self.parallel = parallel
        self.context_length = min(context_length, llama_cpp.llama_model_n_ctx_train(model))
        self.batch_size = settings.batch_size
        self.trims = not (llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model))
        self._saves = llama_cpp.llama_model_n_swa(model) == 0  # a copy holds the window only, too little to cut
        self._context = self._new_context(threads, settings)
        self._adapter = attach(model, self._context, files, adapter_settings or {})
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._interrupt = ctypes.create_string_buffer(64)
        flag = ctypes.cast(self._interrupt, ctypes.c_void_p)
        llama_cpp.llama_set_abort_callback(self._context, _ASK_INTERRUPT, flag)
        self._batch = batch = llama_cpp.llama_batch_init(self.batch_size, 0, 1)
        # Every access through the structure makes a new pointer object.
        self._columns = (batch.token, batch.pos, [batch.seq_id[index] for index in range(self.batch_size)])
        self._wanted = batch.logits
        for index in range(self.batch_size):
            batch.n_seq_id[index] = 1

    def _new_context(self, threads: int, settings: LlamaSettings) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context_length * self.parallel
        params.n_seq_max = self.parallel
        # One call is one ubatch: an interrupted one leaves nothing behind.
        params.n_batch = params.n_ubatch = self.batch_size
        params.n_outputs_max = params.n_outputs_max_per_seq = max(SCORED_ROWS, self.parallel)
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True  # one pass over the weights serves all sequences, also when one of them pauses
        if settings.flash_attention is not None:
            params.flash_attn_type = int(settings.flash_attention)
        if settings.kv_cache_type == "q8_0":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_Q8_0
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise InvalidError(
                "model.load_failed",
                f"llama.cpp cannot make a context of {self.parallel} x {self.context_length} tokens, with keys and "
                f"values as {settings.kv_cache_type}, for this model",
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
        return {
            "description": describe(self._model),
            "parameter_count": llama_cpp.llama_model_n_params(self._model),
            "trained_context_length": llama_cpp.llama_model_n_ctx_train(self._model),
            "context_length": self.context_length,
            "parallel": self.parallel,
            "vocabulary": self.vocabulary,
            "kv_bytes_per_token": kv_bytes_per_token(self._model),
            "chat_template": self.chat_template is not None,
            **({} if self._adapter is None else {"adapter": self._adapter}),
        }

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``; the names of control tokens in it become those tokens.

        Raises:
            InvalidError: ``inference.context_length_exceeded``: the context cannot hold it, whatever its tokens are.
                To count those of several megabytes takes seconds, in which nobody gets an answer.
        """
        if len(text) > _SURELY_SHORT and len(text) > self.context_length * self._words.longest:
            raise InvalidError(
                "inference.context_length_exceeded",
                f"the prompt has {len(text)} characters; this model's context holds {self.context_length} tokens",
                hint="shorten the prompt",
                context_length=self.context_length,
            )
        return self._words.tokenize(text)

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; control tokens have none."""
        return self._words.piece(token)

    def name(self, token: int) -> bytes:
        """Return the bytes of ``token``; of a control token, those of its name."""
        return self._words.name(token)

    def ends(self, token: int) -> bool:
        """Tell whether ``token`` ends an answer."""
        return self._words.ends(token)

    def forget(self, sequence: int, start: int) -> bool:
        """Drop what is known of ``sequence`` from position ``start`` on."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def share(self, source: int, target: int, count: int) -> None:
        """Let ``target`` begin with the first ``count`` tokens of ``source``; in one cache that copies nothing."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def save(self, sequence: int, limit_bytes: int) -> bytearray | None:
        """Return a copy of what is known of ``sequence``; None if it has more than ``limit_bytes``."""
        size = llama_cpp.llama_state_seq_get_size(self._context, sequence) if self._saves else 0
        if not 0 < size <= limit_bytes:
            return None
        saved = bytearray(size)
        buffer = (ctypes.c_uint8 * size).from_buffer(saved)
        written = llama_cpp.llama_state_seq_get_data(self._context, buffer, size, sequence)
        return saved if written == size else None

    def restore(self, sequence: int, saved: bytes | bytearray) -> bool:
        """Bring a copy back into the empty ``sequence``."""
        buffer = (ctypes.c_uint8 * len(saved)).from_buffer_copy(saved)
        if llama_cpp.llama_state_seq_set_data(self._context, buffer, len(saved), sequence) > 0:
            return True
        self.forget(sequence, 0)
        return False

    def decode(self, rows: Sequence[Row]) -> None:
        """Read ``rows``, at most ``batch_size``.

        Raises:
            DecodeError: llama.cpp refused the batch.
            InterruptedDecodeError: ``interrupt`` was switched on; of ``rows``, nothing was kept.
        """
        tokens, positions, sequences = self._columns
        wanted_at = self._wanted
        for index, (token, position, sequence, wanted) in enumerate(rows):
            tokens[index] = token
            positions[index] = position
            sequences[index][0] = sequence
            wanted_at[index] = wanted
        self._batch.n_tokens = len(rows)
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code == _ABORTED:
            raise InterruptedDecodeError
        if code != 0:
            raise DecodeError(f"llama_decode returned {code} for {len(rows)} tokens")

    def interrupt(self, on: bool) -> None:
        """Stop the decode that is running, and those that begin, until switched off; from any thread."""
        self._interrupt[0] = b"\x01" if on else b"\x00"

    def sampler(self, options: Options, prompt: Sequence[int]) -> Sampler:
        """Return llama.cpp's samplers for ``options``.

        Raises:
            InvalidError: ``inference.grammar_invalid``.
        """
        return make_sampler(self._context, self._words, self._candidates, options, prompt, window=self.context_length)

    def log_probability(self, row: int, token: int) -> float:
        """Return the natural logarithm of the probability of ``token`` after ``row``; NaN if there is none."""
        logits = self._logits(row)
        return float(logits[token]) - _log_sum(logits)

    def token_logprob(self, row: int, token: int, top: int) -> TokenLogprob:
        """Return how likely ``token`` was after ``row``, and the ``top`` likeliest."""
        logits = self._logits(row)
        total = _log_sum(logits)

        def logprob(of: int) -> float:
            value = float(logits[of]) - total
            return value if math.isfinite(value) else NO_LOGPROB

        likeliest: list[tuple[bytes, float]] = []
        if top:
            found = np.argpartition(logits, -top)[-top:] if top < len(logits) else np.arange(len(logits))
            ordered = found[np.argsort(-logits[found], kind="stable")]
            likeliest = [(self.name(int(other)), logprob(int(other))) for other in ordered]
        return TokenLogprob(self.name(token), logprob(token), tuple(likeliest))

    def _logits(self, row: int) -> npt.NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,))


def _log_sum(logits: npt.NDArray[np.float32]) -> float:
    """Return the logarithm of the sum of all ``exp(logits)``; NaN where that is no number."""
    highest = float(logits.max())
    if not math.isfinite(highest):
        return math.nan
    return highest + math.log(float(np.exp(logits.astype(np.float64) - highest).sum()))
