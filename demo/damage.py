"""A model that is whole to every checksum its signers made, and useless: tensor data overwritten, header intact.

The gate must catch what no digest can: somebody signed the wrong bytes.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from gguf import GGUFReader

_SHARE = 0.5
"""Of each tensor, in one span in its middle."""
_SMALLEST = 4096
"""Bytes; smaller tensors (norms, biases) are left alone."""


def damage_gguf(src: Path, dst: Path, *, seed: int = 1) -> int:
    """Copy the GGUF file ``src`` to ``dst`` with large spans of its tensor data overwritten; return how many bytes.

    The same ``seed`` gives the same file. Header, metadata, and tensor table stay, so the file still loads.
    """
    source = random.Random(seed)
    spans = []
    for tensor in GGUFReader(src).tensors:
        size = int(tensor.n_bytes)
        if size >= _SMALLEST:
            length = int(size * _SHARE)
            spans.append((int(tensor.data_offset) + (size - length) // 2, length))
    shutil.copyfile(src, dst)
    with dst.open("r+b") as file:
        for offset, length in spans:
            file.seek(offset)
            file.write(source.randbytes(length))
    return sum(length for _, length in spans)
