"""The Open Inference Protocol's requests and answers: checked on the way in, written on the way out.

A tensor is a JSON list, or binary data behind the JSON. Source: Open Inference Protocol, "HTTP/REST",
kserve/open-inference-protocol; Triton Inference Server, "Binary Tensor Data Extension". Imported inside workers only
(numpy).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from garrison_agent.runtimes.tensors.tensor import (
    TYPES,
    Array,
    BinaryTensorError,
    TensorSpec,
    from_binary,
    holdable,
    to_binary,
)
from garrison_protocol.errors import InvalidError, UnavailableError

HEADER_LENGTH = b"inference-header-content-length"
"""The HTTP header that says where the JSON ends and binary tensors begin."""
EXTENSIONS = ("binary_tensor_data",)

_KINDS = {"BOOL": "b", "INT": "iu", "UINT": "iu", "FP": "iuf"}
"""Which kinds of JSON values a family of datatypes takes, as numpy names them."""
_SHOWN = 80
_NOT_OFFERED = ("classification", "shared_memory_region")
"""Extensions of others that change what an output is: ignoring them would answer another question."""


@dataclass(frozen=True)
class InferRequest:
    """A checked request. ``outputs`` are the names to compute, in the order asked for; ``binary``: those to send so."""

    id: str | None
    inputs: dict[str, Array]
    outputs: tuple[str, ...]
    binary: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EncodedAnswer:
    """An answer's body. ``header_length``: how much of it is JSON, where binary tensors follow; None: all of it."""

    body: bytes
    header_length: int | None


def parse_header_length(value: str) -> int:
    """Return the length in the header ``HEADER_LENGTH``.

    Raises:
        InvalidError: ``oip.malformed``.
    """
    if not (value.isascii() and value.isdecimal() and len(value) <= 12):
        _refuse("malformed", "Inference-Header-Content-Length is no length in bytes")
    return int(value)


def parse_infer(
    body: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], header_length: int | None = None
) -> InferRequest:
    """Return the request in ``body``, which fits a model with ``inputs`` and ``outputs`` exactly.

    ``header_length``: where the JSON ends and binary tensors begin; None: there are none.

    Raises:
        InvalidError: ``oip.malformed``, ``oip.input_missing``, ``oip.input_unknown``, ``oip.output_unknown``,
            ``oip.datatype_mismatch``, ``oip.shape_mismatch``, or ``oip.data_mismatch``.
    """
    if header_length is not None and header_length > len(body):
        _refuse("malformed", f"the header is said to have {header_length} bytes, the whole body has {len(body)}")
    try:
        request = json.loads(body if header_length is None else body[:header_length])
    except (ValueError, RecursionError):
        _refuse("malformed", "the body is not JSON, up to where binary tensors begin")
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
        _refuse("malformed", "the body must be an object with a list named inputs")
    binary = None if header_length is None else _Binary(memoryview(body)[header_length:])
    wanted = {spec.name: spec for spec in inputs}
    tensors: dict[str, Array] = {}
    for item in request["inputs"]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            _refuse("malformed", "each input must be an object with a name")
        name = item["name"]
        spec = wanted.get(name)
        if spec is None:
            _refuse("input_unknown", f"the model has no input {_shown(name)}, only {_names(inputs)}")
        if name in tensors:
            _refuse("malformed", f"input {name!r} stands there twice")
        tensors[name] = _tensor(item, spec, binary)
    if binary is not None and binary.left:
        _refuse("data_mismatch", f"{binary.left} bytes follow the last binary tensor")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        _refuse("input_missing", f"the model also needs {', '.join(missing)}")
    identity = request.get("id")
    return InferRequest(identity if isinstance(identity, str) else None, tensors, *_asked(request, outputs))


def check_rows(inputs: Mapping[str, Array], specs: Sequence[TensorSpec], most: int) -> None:
    """Return if no input has more than ``most`` rows where the model lets their number open.

    Raises:
        InvalidError: ``oip.too_many_rows``.
    """
    for spec in specs:
        array = inputs.get(spec.name)
        if array is not None and spec.shape[:1] == (-1,) and array.shape[0] > most:
            _refuse("too_many_rows", f"input {spec.name!r} has {array.shape[0]} rows; one request takes {most}")


def encode_answer(
    head: Mapping[str, Any], arrays: Mapping[str, Array], datatypes: Mapping[str, str], binary: Collection[str] = ()
) -> EncodedAnswer:
    """Return the answer that begins with ``head`` and carries ``arrays``; those in ``binary`` behind the JSON.

    Raises:
        UnavailableError: ``oip.not_finite``: an output that goes as JSON holds NaN or infinity.
    """
    outputs = []
    parts = []
    for name, array in arrays.items():
        described: dict[str, Any] = {"name": name, "datatype": datatypes[name], "shape": list(array.shape)}
        if name in binary:
            parts.append(to_binary(array, datatypes[name]))
            described["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            described["data"] = _json_data(name, array, datatypes[name])
        outputs.append(described)
    text = json.dumps({**head, "outputs": outputs}, separators=(",", ":"), allow_nan=False).encode()
    return EncodedAnswer(b"".join([text, *parts]), len(text)) if parts else EncodedAnswer(text, None)


def _json_data(name: str, array: Array, datatype: str) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UnavailableError(
            "oip.not_finite",
            f"output {name!r} holds NaN or infinity, which JSON cannot carry",
            hint="ask for it as binary data",
        )
    data: list[Any] = array.ravel().tolist()
    if datatype == "BYTES":
        return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in data]
    return data


class _Binary:
    """The bytes behind the JSON, taken piece by piece in the order of the inputs."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def left(self) -> int:
        return len(self._data)

    def take(self, size: int) -> memoryview:
        taken, self._data = self._data[:size], self._data[size:]
        return taken


def _asked(request: dict[str, Any], outputs: Sequence[TensorSpec]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the outputs to compute, and those of them that go as binary data."""
    known = [spec.name for spec in outputs]
    all_binary = _flag(request, "binary_data_output", default=False)
    asked = request.get("outputs")
    if not asked:
        return tuple(known), frozenset(known if all_binary else ())
    if not isinstance(asked, list) or not all(isinstance(item, dict) for item in asked):
        _refuse("malformed", "outputs must be a list of objects with a name")
    binary: dict[str, bool] = {}
    for item in asked:
        name = item.get("name")
        if name not in known:
            _refuse("output_unknown", f"the model has no output {_shown(name)}, only {_names(outputs)}")
        binary[name] = _flag(item, "binary_data", default=all_binary)
        unknown = [key for key in _NOT_OFFERED if key in _parameters(item)]
        if unknown:
            _refuse("malformed", f"output {name!r}: the parameter {unknown[0]} is not offered here")
    return tuple(binary), frozenset(name for name, so in binary.items() if so)


def _parameters(item: dict[str, Any]) -> dict[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        _refuse("malformed", "parameters must be an object")
    return parameters


def _flag(item: dict[str, Any], name: str, *, default: bool) -> bool:
    value = _parameters(item).get(name, default)
    if not isinstance(value, bool):
        _refuse("malformed", f"the parameter {name} is true or false")
    return value


def _tensor(item: dict[str, Any], spec: TensorSpec, binary: _Binary | None) -> Array:
    name, shape, data = spec.name, item.get("shape"), item.get("data")
    if item.get("datatype") != spec.datatype:
        _refuse("datatype_mismatch", f"input {name!r} is {spec.datatype}, not {_shown(item.get('datatype'))}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        _refuse("malformed", f"input {name!r} needs a shape: a list of sizes")
    if not spec.fits(shape) or not holdable(shape):
        _refuse("shape_mismatch", f"input {name!r} has shape {list(spec.shape)}, not {_shown(shape)}")
    size = _parameters(item).get("binary_data_size")
    if size is not None:
        if data is not None:
            _refuse("malformed", f"input {name!r} has its data twice: as a list, and as binary data")
        return _from_binary(size, spec, shape, binary)
    if not isinstance(data, list):
        _refuse("malformed", f"input {name!r} needs its data as a JSON list, or as binary data with its size")
    array = _array(data, spec)
    if array.size != math.prod(shape):
        _refuse("data_mismatch", f"input {name!r}: {array.size} values for a shape of {math.prod(shape)}")
    return array.reshape(shape)


def _from_binary(size: object, spec: TensorSpec, shape: list[int], binary: _Binary | None) -> Array:
    name = spec.name
    if type(size) is not int or size < 0:
        _refuse("malformed", f"input {name!r}: binary_data_size is no size in bytes")
    if binary is None:
        _refuse("malformed", "binary tensors need the header Inference-Header-Content-Length: the length of the JSON")
    if size > binary.left:
        _refuse("data_mismatch", f"input {name!r}: {size} bytes of binary data are said to follow, not {binary.left}")
    try:
        return from_binary(binary.take(size), spec.datatype, shape)
    except BinaryTensorError as error:
        _refuse("data_mismatch", f"input {name!r}: {error}")


def _array(data: list[Any], spec: TensorSpec) -> Array:
    """Return ``data``, flat or nested, in the datatype of ``spec``; nothing is rounded or wrapped."""
    name, datatype = spec.name, spec.datatype
    target = TYPES[datatype]
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
        bounds = np.iinfo(target)
        if int(array.min()) < bounds.min or int(array.max()) > bounds.max:
            _refuse("data_mismatch", f"input {name!r}: a value does not fit {datatype}")
    with np.errstate(over="ignore"):
        tensor = array.astype(target)
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        _refuse("data_mismatch", f"input {name!r}: a value is NaN or infinite, or does not fit {datatype}")
    return tensor


def _shown(value: object) -> str:
    """Return what a client wrote, short enough for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _refuse(code: str, message: str) -> NoReturn:
    raise InvalidError(f"oip.{code}", message, hint="GET /v2/models/<name> lists inputs, datatypes and shapes")
