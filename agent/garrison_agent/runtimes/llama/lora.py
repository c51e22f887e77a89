"""LoRA adapters that a manifest names: ``model_settings.adapter`` is the path of another file of the variant.

``adapter_scale`` (text or a whole number) weighs it: 1 as it was trained, 0 without effect. Every call happens in the
thread that owns the model. Source: llama.h, "Adapters".
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import llama_cpp

from garrison_agent.runtimes.spec import OpenFile, Settings
from garrison_protocol.errors import InvalidError

_MAX_SCALE = 100.0


def attach(model: Any, context: Any, files: Sequence[OpenFile], settings: Settings) -> str | None:
    """Put the adapter that ``settings`` names on ``context``; return its path in the package, None if there is none.

    Raises:
        InvalidError: ``model.load_failed``: the adapter is missing, damaged, or made for another model.
    """
    path = settings.get("adapter")
    if path is None:
        return None
    file = next((file for file in files[1:] if file.path == path), None)
    if file is None:
        raise _failed(f"model_settings: adapter {path!r} is no file of this variant beside the model itself")
    scale = _scale(settings.get("adapter_scale", 1))
    adapter = llama_cpp.llama_adapter_lora_init(model, file.native_path.encode())
    if not adapter:
        raise _failed(f"llama.cpp cannot use the adapter {file.path}: damaged, or made for another model")
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    if llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(scale)) != 0:
        raise _failed(f"llama.cpp refuses the adapter {file.path} for this model")
    return file.path


def _scale(value: str | int | bool) -> float:
    try:
        scale = math.nan if isinstance(value, bool) else float(value)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= _MAX_SCALE:
        raise _failed(f"model_settings: adapter_scale is {value!r}; it must be a number, like 1 or 0.5")
    return scale


def _failed(message: str) -> InvalidError:
    return InvalidError(
        "model.load_failed", message, hint="publish a version of the package with the right adapter and model_settings"
    )
