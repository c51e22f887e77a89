"""Loading a GGUF file with llama.cpp. Imported by a verified worker only; importing it loads the native library."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import llama_cpp

from garrison_protocol.errors import InvalidError


def _drop(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Take a line of llama.cpp's log to nowhere."""


_SILENT = llama_cpp.llama_log_callback(_drop)
"""Module-global: a collected callback is called all the same, and crashes."""


def load_model(path: str) -> Any:
    """Return llama.cpp's model in the file ``path``, on the CPU.

    Raises:
        InvalidError: ``model.load_failed``: not a GGUF file that this llama.cpp can run.
    """
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    params.n_gpu_layers = 0
    params.use_extra_bufts = not _has_amx()
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise InvalidError(
            "model.load_failed",
            "llama.cpp cannot load this GGUF file: damaged, cut short, or of an architecture it does not know",
            hint="check the package on a workstation, and that the agent's llama-cpp-python is recent enough",
        )
    return model


def metadata(model: Any, key: str) -> str | None:
    """Return a value of the file's metadata as text, None if it has none."""
    buffer = ctypes.create_string_buffer(256)
    size = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if size >= 0 else None


def describe(model: Any) -> str:
    """Return a line about the model's kind, size, and quantization."""
    buffer = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(model, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def kv_bytes_per_token(model: Any) -> int:
    """Return how many bytes of keys and values one token of context takes, in llama.cpp's default half precision.

    More than that never: models with sliding windows keep less. 0: the model keeps none, or not in every layer.
    """
    if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
        return 0
    heads = max(1, llama_cpp.llama_model_n_head(model))
    head_size = llama_cpp.llama_model_n_embd(model) // heads
    kind = metadata(model, "general.architecture") or ""
    sizes = [metadata(model, f"{kind}.attention.{part}_length") for part in ("key", "value")]
    key, value = (int(size) if size and size.isdecimal() else head_size for size in sizes)
    return int(llama_cpp.llama_model_n_layer(model) * llama_cpp.llama_model_n_head_kv(model) * (key + value) * 2)


def _has_amx() -> bool:
    """Tell whether llama.cpp would repack weights for AMX here.

    Its AMX kernels crash on prompts (Q4_1: always; ggml-org/llama.cpp#20824), so such machines run on AVX-512.
    Elsewhere repacking is wanted: on ARM it makes Q4_0 several times faster.
    """
    if platform.machine() != "x86_64":
        return False
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as cpuinfo:
        return any(line.startswith("flags") and "amx_int8" in line.split() for line in cpuinfo)
