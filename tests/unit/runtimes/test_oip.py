from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from garrison_agent.runtimes.oip import TensorSpec, encode_outputs, parse_infer
from garrison_protocol.errors import GarrisonError, InvalidError

INPUTS = [TensorSpec("x", "INT32", (-1, 2)), TensorSpec("w", "FP32", (1,))]
OUTPUTS = [TensorSpec("y", "FP32", (1,)), TensorSpec("z", "INT64", (1,))]
W = {"name": "w", "datatype": "FP32", "shape": [1], "data": [0.5]}


def x(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "INT32", "shape": [2, 2], "data": [1, 2, 3, 4], **changes}


def body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]], ids=["flat", "nested"])
def test_tensors_arrive_in_their_datatype_and_shape(data: list[Any]) -> None:
    request = parse_infer(body(x(data=data), W, id="42"), INPUTS, OUTPUTS)
    assert request.id == "42"
    assert request.inputs["x"].dtype == np.int32
    assert request.inputs["x"].tolist() == [[1, 2], [3, 4]]
    assert request.inputs["w"].dtype == np.float32
    assert request.outputs == ("y", "z")


def test_only_the_outputs_asked_for_are_computed() -> None:
    request = parse_infer(body(x(), W, outputs=[{"name": "z"}]), INPUTS, OUTPUTS)
    assert request.outputs == ("z",)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{", "oip.malformed"),
        (b"[" * 100_000, "oip.malformed"),
        (b"[]", "oip.malformed"),
        (b'{"inputs": 3}', "oip.malformed"),
        (b'{"inputs": [3]}', "oip.malformed"),
        (body(x()), "oip.input_missing"),
        (body(x(), W, {**W, "name": "q"}), "oip.input_unknown"),
        (body(x(), x(), W), "oip.malformed"),
        (body(x(datatype="INT64"), W), "oip.datatype_mismatch"),
        (body(x(datatype=None), W), "oip.datatype_mismatch"),
        (body(x(shape=[4]), W), "oip.shape_mismatch"),
        (body(x(shape=[1, 4]), W), "oip.shape_mismatch"),
        (body(x(shape=[-2, 2]), W), "oip.malformed"),
        (body(x(shape=[True, 2]), W), "oip.malformed"),
        (body(x(data=[1, 2, 3]), W), "oip.data_mismatch"),
        (body(x(data=[1, 2, 3, 4.5]), W), "oip.data_mismatch"),
        (body(x(data=[1, 2, 3, "4"]), W), "oip.data_mismatch"),
        (body(x(data=[1, 2, 3, None]), W), "oip.data_mismatch"),
        (body(x(data=[1, 2, 3, 2**31]), W), "oip.data_mismatch"),
        (body(x(data=[1, 2, 3, 2**80]), W), "oip.data_mismatch"),
        (body(x(data=[[1, 2], [3]]), W), "oip.data_mismatch"),
        (body(x(data="1234"), W), "oip.malformed"),
        (body(x(), W, outputs=[{"name": "q"}]), "oip.output_unknown"),
        (body(x(), W, outputs=[3]), "oip.malformed"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_with_its_reason(data: bytes, code: str) -> None:
    with pytest.raises(InvalidError) as refused:
        parse_infer(data, INPUTS, OUTPUTS)
    assert refused.value.code == code


def test_strings_travel_as_bytes_tensors() -> None:
    spec = [TensorSpec("s", "BYTES", (-1,))]
    request = parse_infer(body({"name": "s", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]}), spec, spec)
    assert request.inputs["s"].tolist() == ["a", "é"]
    assert encode_outputs({"s": request.inputs["s"]}, {"s": "BYTES"})[0]["data"] == ["a", "é"]


def test_outputs_are_flat_with_their_shape() -> None:
    (output,) = encode_outputs({"y": np.array([[1, 2]], np.int64)}, {"y": "INT64"})
    assert output == {"name": "y", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_json_cannot_carry_is_an_error(value: float) -> None:
    with pytest.raises(GarrisonError) as refused:
        encode_outputs({"y": np.array([value], np.float32)}, {"y": "FP32"})
    assert refused.value.code == "oip.not_finite"
