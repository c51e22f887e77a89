"""Tensors in the Open Inference Protocol's words: datatypes, shapes, and their binary form.

Binary: little-endian, row by row, no padding; a string is four bytes of length and its bytes. Source: Triton
Inference Server, "Binary Tensor Data Extension". Imported inside workers only (numpy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
"""The protocol's datatypes -> numpy's, as they travel."""
MAX_ELEMENTS = 2**31
"""Of a shape, empty dimensions left out: more than any request's body holds, and what products are safe up to."""
_LENGTH_BYTES = 4


class BinaryTensorError(ValueError):
    """The bytes are not the binary form of the tensor; the text says why."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model; -1 in ``shape`` stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the metadata form."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    def fits(self, shape: Sequence[int]) -> bool:
        """Tell whether a tensor of ``shape`` may stand here."""
        return len(shape) == len(self.shape) and all(
            want in (-1, have) for want, have in zip(self.shape, shape, strict=True)
        )


def holdable(shape: Sequence[int]) -> bool:
    """Tell whether a tensor of ``shape`` can exist at all; an empty one may still have absurd other sizes."""
    return math.prod(max(size, 1) for size in shape) <= MAX_ELEMENTS


def from_binary(data: memoryview, datatype: str, shape: Sequence[int]) -> Array:
    """Return the tensor in ``data``, without a copy where its bytes are aligned for their type (strings: a copy).

    Raises:
        BinaryTensorError: The size is not that of ``shape``, or a value is none of ``datatype``.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(data, count).reshape(shape)
    dtype = TYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise BinaryTensorError(f"{len(data)} bytes, but {count} values of {datatype} have {count * dtype.itemsize}")
    if datatype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise BinaryTensorError("a BOOL is a byte of value 0 or 1")
    return np.require(np.frombuffer(data, dtype), requirements="A").reshape(shape)


def _strings(data: memoryview, count: int) -> Array:
    if count * _LENGTH_BYTES > len(data):
        raise BinaryTensorError(f"{len(data)} bytes are too few for {count} strings")
    array = np.empty(count, np.object_)
    place = 0
    for index in range(count):
        begin = place + _LENGTH_BYTES
        place = begin + int.from_bytes(data[place:begin], "little")
        if begin > len(data) or place > len(data):
            raise BinaryTensorError(f"string {index} is cut short")
        try:
            array[index] = str(data[begin:place], "utf-8")
        except UnicodeDecodeError:
            raise BinaryTensorError(f"string {index} is not UTF-8, which is all that this runtime takes") from None
    if place != len(data):
        raise BinaryTensorError(f"{len(data) - place} bytes follow the last of {count} strings")
    return array


def to_binary(array: Array, datatype: str) -> bytes:
    """Return the binary form of ``array``."""
    if datatype == "BYTES":
        parts = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
        return b"".join(len(part).to_bytes(_LENGTH_BYTES, "little") + part for part in parts)
    return array.astype(TYPES[datatype], copy=False).tobytes()
