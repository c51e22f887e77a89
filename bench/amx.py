"""Whether llama.cpp's repacking must be off here, for the yardsticks as for the workers.

Its AMX kernels crash on prompts of Q4_1 models (ggml-org/llama.cpp#20824).
"""

from __future__ import annotations

from pathlib import Path


def has_amx() -> bool:
    """Tell whether this processor has AMX tiles for bytes."""
    return " amx_int8 " in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").replace("\n", " ")
