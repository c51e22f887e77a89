"""``python -m bench.llama_python_server ARGUMENTS``: llama-cpp-python's own server, with its own command line.

Only one thing differs from ``python -m llama_cpp.server``: where llama.cpp's AMX kernels would crash, weights are not
repacked, which the server has no switch for. Our worker does the same there, so both run the same kernels.
"""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as native
from llama_cpp.server.__main__ import main

from bench.amx import has_amx

_defaults = native.llama_model_default_params


def _without_repacking() -> Any:
    params = _defaults()
    params.use_extra_bufts = not has_amx()
    return params


if __name__ == "__main__":
    native.llama_model_default_params = _without_repacking
    main()  # type: ignore[no-untyped-call] # it has no annotations
