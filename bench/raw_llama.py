"""``python -m bench.raw_llama MODEL THREADS``: the yardstick, llama.cpp driven by nothing but a loop.

Each line of standard input is ``{"prompt": ..., "tokens": n}``; each line of output is ``{"seconds": s}``, from the
prompt's text to the ``n``-th greedy token as text. One sequence, the same library and model file as a worker's.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp

from bench.amx import has_amx

CONTEXT_LENGTH = 2048
BATCH_SIZE = 512


class Raw:
    """A model, a context, and a greedy sampler."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = not has_amx()
        self._model: Any = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT_LENGTH
        params.n_batch = params.n_ubatch = BATCH_SIZE
        params.n_threads = params.n_threads_batch = threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        chain: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        self._sampler = chain

    def generate(self, prompt: str, count: int) -> float:
        """Return the seconds that ``count`` tokens after ``prompt`` take."""
        began_s = time.perf_counter()
        data = prompt.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 2))()
        size = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, len(data) + 2, True, True)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), -1, -1, -1)
        batch = llama_cpp.llama_batch_get_one(tokens, size)
        piece = ctypes.create_string_buffer(256)
        token = (llama_cpp.llama_token * 1)()
        text = b""
        for _ in range(count):
            if llama_cpp.llama_decode(self._context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            token[0] = llama_cpp.llama_sampler_sample(self._sampler, self._context, -1)
            length = llama_cpp.llama_token_to_piece(self._vocab, token[0], piece, len(piece), 0, False)
            text += piece.raw[:length]
            batch = llama_cpp.llama_batch_get_one(token, 1)
        return time.perf_counter() - began_s


def main() -> None:
    """Serve measurements until the end of input."""
    raw = Raw(sys.argv[1], int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps({"seconds": raw.generate(order["prompt"], int(order["tokens"]))}), flush=True)


def _drop(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Take a line of llama.cpp's log to nowhere."""


_SILENT = llama_cpp.llama_log_callback(_drop)

if __name__ == "__main__":
    main()
