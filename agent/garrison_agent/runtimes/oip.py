"""The Open Inference Protocol's JSON tensors: checked on the way in, written on the way out.

Source: Open Inference Protocol, "HTTP/REST", kserve/open-inference-protocol. Imported inside workers only (numpy).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from garrison_protocol.errors import InvalidError, UnavailableError

Array = npt.NDArray[Any]

_KINDS = {"BOOL": "b", "INT": "iu", "UINT": "iu", "FP": "iuf"}
"""Which kinds of JSON values a family of datatypes takes, as numpy names them."""

_TYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}


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


@dataclass(frozen=True)
class InferRequest:
    """A checked request. ``outputs`` are the names to compute, in the order asked for."""

    id: str | None
    inputs: dict[str, Array]
    outputs: tuple[str, ...]


def parse_infer(body: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InferRequest:
    """Return the request in ``body``, which fits a model with ``inputs`` and ``outputs`` exactly.

    Raises:
        InvalidError: ``oip.malformed``, ``oip.input_missing``, ``oip.input_unknown``, ``oip.output_unknown``,
            ``oip.datatype_mismatch``, ``oip.shape_mismatch``, or ``oip.data_mismatch``.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        _refuse("malformed", "the body is not JSON")
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
        _refuse("malformed", "the body must be an object with a list named inputs")
    wanted = {spec.name: spec for spec in inputs}
    tensors: dict[str, Array] = {}
    for item in request["inputs"]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            _refuse("malformed", "each input must be an object with a name")
        name = item["name"]
        spec = wanted.get(name)
        if spec is None:
            _refuse("input_unknown", f"the model has no input {name!r}, only {_names(inputs)}")
        if name in tensors:
            _refuse("malformed", f"input {name!r} stands there twice")
        tensors[name] = _tensor(item, spec)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        _refuse("input_missing", f"the model also needs {', '.join(missing)}")
    identity = request.get("id")
    return InferRequest(identity if isinstance(identity, str) else None, tensors, _asked(request, outputs))


def encode_outputs(arrays: Mapping[str, Array], datatypes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the tensors of an answer.

    Raises:
        UnavailableError: ``oip.not_finite``: an output holds NaN or infinity, which JSON cannot carry.
    """
    outputs = []
    for name, array in arrays.items():
        datatype = datatypes[name]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UnavailableError("oip.not_finite", f"output {name!r} holds NaN or infinity, which JSON cannot carry")
        data: list[Any] = array.ravel().tolist()
        if datatype == "BYTES":
            data = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in data]
        outputs.append({"name": name, "datatype": datatype, "shape": list(array.shape), "data": data})
    return outputs


def _asked(request: dict[str, Any], outputs: Sequence[TensorSpec]) -> tuple[str, ...]:
    known = [spec.name for spec in outputs]
    asked = request.get("outputs")
    if not asked:
        return tuple(known)
    if not isinstance(asked, list) or not all(isinstance(item, dict) for item in asked):
        _refuse("malformed", "outputs must be a list of objects with a name")
    names = tuple(item.get("name") for item in asked)
    for name in names:
        if name not in known:
            _refuse("output_unknown", f"the model has no output {name!r}, only {_names(outputs)}")
    return tuple(dict.fromkeys(names))


def _tensor(item: dict[str, Any], spec: TensorSpec) -> Array:
    name, shape, data = spec.name, item.get("shape"), item.get("data")
    if item.get("datatype") != spec.datatype:
        _refuse("datatype_mismatch", f"input {name!r} is {spec.datatype}, not {item.get('datatype')!r}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        _refuse("malformed", f"input {name!r} needs a shape: a list of sizes")
    if not spec.fits(shape):
        _refuse("shape_mismatch", f"input {name!r} has shape {list(spec.shape)}, not {shape}")
    if not isinstance(data, list):
        _refuse("malformed", f"input {name!r} needs its data as a JSON list")
    array = _array(data, spec)
    if array.size != math.prod(shape):
        _refuse("data_mismatch", f"input {name!r}: {array.size} values for a shape of {math.prod(shape)}")
    return array.reshape(shape)


def _array(data: list[Any], spec: TensorSpec) -> Array:
    """Return ``data``, flat or nested, in the datatype of ``spec``; nothing is rounded or wrapped."""
    name, datatype = spec.name, spec.datatype
    target = _TYPES[datatype]
    try:
        array = np.array(data)
    except (ValueError, OverflowError, RecursionError) as error:
        _refuse("data_mismatch", f"input {name!r}: the data is not one tensor: {error}")
    if array.size == 0:
        return array.astype(target)
    if datatype == "BYTES":
        if array.dtype.kind != "U":
            _refuse("data_mismatch", f"input {name!r}: BYTES are sent as strings")
        try:
            "".join(array.ravel().tolist()).encode()
        except UnicodeEncodeError:  # JSON may escape half a surrogate pair, which has no bytes
            _refuse("data_mismatch", f"input {name!r}: a string is no valid Unicode")
        return array.astype(np.object_)
    if array.dtype.kind not in _KINDS[datatype.rstrip("0123456789")]:
        _refuse("data_mismatch", f"input {name!r}: the data does not hold {datatype} values only")
    if array.dtype.kind in "iu" and np.issubdtype(target, np.integer):
        bounds = np.iinfo(np.dtype(target))
        if int(array.min()) < bounds.min or int(array.max()) > bounds.max:
            _refuse("data_mismatch", f"input {name!r}: a value does not fit {datatype}")
    with np.errstate(over="ignore"):
        tensor = array.astype(target)
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        _refuse("data_mismatch", f"input {name!r}: a value is NaN or infinite, or does not fit {datatype}")
    return tensor


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _refuse(code: str, message: str) -> NoReturn:
    raise InvalidError(f"oip.{code}", message, hint="GET /v2/models/<name> lists inputs, datatypes and shapes")
