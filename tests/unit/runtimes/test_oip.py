from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest

from garrison_agent.runtimes.tensors.oip import EncodedAnswer, encode_answer, parse_header_length, parse_infer
from garrison_agent.runtimes.tensors.tensor import TYPES, Array, TensorSpec
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


def outputs_of(answer: EncodedAnswer) -> list[dict[str, Any]]:
    outputs = json.loads(answer.body[: answer.header_length])["outputs"]
    assert isinstance(outputs, list)
    return outputs


def test_strings_travel_as_bytes_tensors() -> None:
    spec = [TensorSpec("s", "BYTES", (-1,))]
    request = parse_infer(body({"name": "s", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]}), spec, spec)
    assert request.inputs["s"].tolist() == ["a", "é"]
    (output,) = outputs_of(encode_answer({}, request.inputs, {"s": "BYTES"}))
    assert output["data"] == ["a", "é"]


def test_outputs_are_flat_with_their_shape() -> None:
    answer = encode_answer({"id": "7"}, {"y": np.array([[1, 2]], np.int64)}, {"y": "INT64"})
    assert answer.header_length is None
    output = {"name": "y", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
    assert json.loads(answer.body) == {"id": "7", "outputs": [output]}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_json_cannot_carry_goes_as_binary_data_only(value: float) -> None:
    arrays = {"y": np.array([value], np.float32)}
    with pytest.raises(GarrisonError) as refused:
        encode_answer({}, arrays, {"y": "FP32"})
    assert refused.value.code == "oip.not_finite"
    answer = encode_answer({}, arrays, {"y": "FP32"}, {"y"})
    assert answer.body[answer.header_length :] == struct.pack("<f", value)


# --- binary tensors --------------------------------------------------------------------------------------------------


def binary(*tensors: tuple[dict[str, Any], bytes], more: bytes = b"", **request: Any) -> tuple[bytes, int]:
    """Return a body whose tensors follow its JSON, and the length of the JSON."""
    inputs = [{"parameters": {"binary_data_size": len(data)}, **tensor} for tensor, data in tensors]
    head = json.dumps({"inputs": inputs, **request}).encode()
    return b"".join([head, *(data for _, data in tensors), more]), len(head)


def bare(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "INT32", "shape": [2, 2], **changes}


FOUR = struct.pack("<4i", 1, -2, 3, 4)
HALF = struct.pack("<f", 0.5)


def test_binary_tensors_follow_in_the_order_of_the_inputs() -> None:
    data, length = binary(({**bare(name="w", datatype="FP32", shape=[1])}, HALF), (bare(), FOUR))
    request = parse_infer(data, INPUTS, OUTPUTS, length)
    assert request.inputs["x"].tolist() == [[1, -2], [3, 4]]
    assert request.inputs["w"].tolist() == [0.5]
    assert request.binary == frozenset()


def test_binary_and_json_tensors_mix() -> None:
    head = json.dumps({"inputs": [W, {**bare(), "parameters": {"binary_data_size": 16}}]}).encode()
    request = parse_infer(head + FOUR, INPUTS, OUTPUTS, len(head))
    assert (request.inputs["w"].tolist(), request.inputs["x"].tolist()) == ([0.5], [[1, -2], [3, 4]])


@pytest.mark.parametrize("padding", range(4))
def test_aligned_data_is_not_copied_and_other_data_becomes_aligned(padding: int) -> None:
    spec = [TensorSpec("x", "INT32", (-1, 2))]
    head = json.dumps({"inputs": [{**bare(), "parameters": {"binary_data_size": 16}}]}).encode()
    head += b" " * ((padding - len(head)) % 4)
    data = head + FOUR
    array = parse_infer(data, spec, OUTPUTS, len(head)).inputs["x"]
    assert array.flags.aligned
    assert np.may_share_memory(array, np.frombuffer(data, np.uint8)) == (padding == 0)


@pytest.mark.parametrize("datatype", [name for name in TYPES if name not in ("BYTES", "BOOL")])
def test_every_number_arrives_as_it_left(datatype: str) -> None:
    spec = [TensorSpec("x", datatype, (-1,))]
    sent = np.array([0, 1, 100], TYPES[datatype])
    data, length = binary((bare(datatype=datatype, shape=[3]), sent.tobytes()))
    request = parse_infer(data, spec, spec, length)
    assert (request.inputs["x"].dtype, request.inputs["x"].tolist()) == (TYPES[datatype], [0, 1, 100])
    answer = encode_answer({}, {"x": sent}, {"x": datatype}, {"x"})
    (output,) = outputs_of(answer)
    assert output == {
        "name": "x",
        "datatype": datatype,
        "shape": [3],
        "parameters": {"binary_data_size": sent.nbytes},
    }
    assert answer.body[answer.header_length :] == sent.tobytes()


def test_not_a_number_is_welcome_as_binary_data() -> None:
    spec = [TensorSpec("x", "FP32", (-1,))]
    data, length = binary((bare(datatype="FP32", shape=[2]), struct.pack("<2f", math.nan, math.inf)))
    assert np.isnan(parse_infer(data, spec, spec, length).inputs["x"][0])


def test_binary_strings_carry_their_lengths() -> None:
    spec = [TensorSpec("s", "BYTES", (-1,))]
    raw = b"\2\0\0\0\xc3\xa9" + b"\0\0\0\0" + b"\3\0\0\0a\0b"
    data, length = binary((bare(name="s", datatype="BYTES", shape=[3]), raw))
    request = parse_infer(data, spec, spec, length)
    assert request.inputs["s"].tolist() == ["é", "", "a\0b"]
    answer = encode_answer({}, request.inputs, {"s": "BYTES"}, {"s"})
    assert answer.body[answer.header_length :] == raw


@pytest.mark.parametrize(
    ("request_parameters", "asked", "expected"),
    [
        ({}, None, set()),
        ({"binary_data_output": True}, None, {"y", "z"}),
        ({"binary_data_output": False}, None, set()),
        ({"binary_data_output": True}, [{"name": "z"}], {"z"}),
        ({}, [{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}], {"y"}),
        ({"binary_data_output": True}, [{"name": "y", "parameters": {"binary_data": False}}, {"name": "z"}], {"z"}),
    ],
)
def test_which_outputs_come_as_binary_data(
    request_parameters: dict[str, Any], asked: list[Any] | None, expected: set[str]
) -> None:
    request = parse_infer(body(x(), W, parameters=request_parameters, outputs=asked), INPUTS, OUTPUTS)
    assert request.binary == expected


def test_an_answer_may_mix_binary_and_json_outputs() -> None:
    arrays: dict[str, Array] = {
        "y": np.array([1.5], np.float32),
        "z": np.array([7], np.int64),
        "v": np.array([2.5], np.float32),
    }
    answer = encode_answer({}, arrays, {"y": "FP32", "z": "INT64", "v": "FP32"}, {"y", "v"})
    described = {output["name"]: output for output in outputs_of(answer)}
    assert described["z"]["data"] == [7]
    assert "data" not in described["y"]
    assert answer.body[answer.header_length :] == struct.pack("<2f", 1.5, 2.5)


@pytest.mark.parametrize(
    ("changes", "data", "code"),
    [
        ({}, FOUR[:-1], "oip.data_mismatch"),
        ({}, FOUR + b"\0", "oip.data_mismatch"),
        ({}, b"", "oip.data_mismatch"),
        ({"parameters": {"binary_data_size": 20}}, FOUR, "oip.data_mismatch"),
        ({"parameters": {"binary_data_size": 12}}, FOUR, "oip.data_mismatch"),
        ({"parameters": {"binary_data_size": -16}}, FOUR, "oip.malformed"),
        ({"parameters": {"binary_data_size": True}}, FOUR, "oip.malformed"),
        ({"parameters": {"binary_data_size": "16"}}, FOUR, "oip.malformed"),
        ({"parameters": {"binary_data_size": 2**70}}, FOUR, "oip.data_mismatch"),
        ({"parameters": [16]}, FOUR, "oip.malformed"),
        ({"data": [1, 2, 3, 4]}, FOUR, "oip.malformed"),
        ({"shape": [2**40, 2]}, FOUR, "oip.shape_mismatch"),
        ({"shape": [4, 1]}, FOUR, "oip.shape_mismatch"),
        ({"datatype": "FP32"}, FOUR, "oip.datatype_mismatch"),
    ],
)
def test_binary_data_that_does_not_fit_is_refused(changes: dict[str, Any], data: bytes, code: str) -> None:
    sent, length = binary((bare(**changes), data))
    with pytest.raises(InvalidError) as refused:
        parse_infer(sent, [INPUTS[0]], OUTPUTS, length)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("BOOL", b"\0\2"),
        ("BYTES", b"\1\0\0\0a"),
        ("BYTES", b"\1\0\0\0a\1\0\0"),
        ("BYTES", b"\1\0\0\0a\xff\xff\xff\xffb"),
        ("BYTES", b"\1\0\0\0a\1\0\0\0bc"),
        ("BYTES", b"\1\0\0\0a\1\0\0\0\xff"),
    ],
    ids=["no bool", "one of two", "length cut short", "longer than all", "bytes left", "no UTF-8"],
)
def test_binary_values_that_are_none_are_refused(datatype: str, data: bytes) -> None:
    spec = [TensorSpec("x", datatype, (-1,))]
    sent, length = binary((bare(datatype=datatype, shape=[2]), data))
    with pytest.raises(InvalidError) as refused:
        parse_infer(sent, spec, spec, length)
    assert refused.value.code == "oip.data_mismatch"


def test_bytes_after_the_last_tensor_are_refused() -> None:
    sent, length = binary((bare(), FOUR), more=b"\0")
    with pytest.raises(InvalidError, match="1 bytes follow") as refused:
        parse_infer(sent, [INPUTS[0]], OUTPUTS, length)
    assert refused.value.code == "oip.data_mismatch"


def test_an_empty_tensor_with_absurd_other_sizes_is_refused() -> None:
    spec = [TensorSpec("x", "INT32", (-1, -1))]
    for tensor in (bare(shape=[0, 2**62]), bare(shape=[0, 2**62], data=[])):
        sent, length = binary((tensor, b""))
        with pytest.raises(InvalidError) as refused:
            parse_infer(sent, spec, OUTPUTS, length)
        assert refused.value.code == "oip.shape_mismatch"


def test_binary_data_needs_the_header_that_says_where_it_begins() -> None:
    sent, length = binary((bare(), FOUR))
    for header_length in (None, 0, length - 1, length + 1, len(sent) + 1):
        with pytest.raises(InvalidError) as refused:
            parse_infer(sent, [INPUTS[0]], OUTPUTS, header_length)
        assert refused.value.code == "oip.malformed"
    with pytest.raises(InvalidError, match="Inference-Header-Content-Length"):
        parse_infer(sent[:length], [INPUTS[0]], OUTPUTS, None)


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.5", "0x10", "٣", "9" * 13, "1, 2"])
def test_a_header_that_is_no_length_is_refused(value: str) -> None:
    with pytest.raises(InvalidError) as refused:
        parse_header_length(value)
    assert refused.value.code == "oip.malformed"


@pytest.mark.parametrize("name", ["classification", "shared_memory_region"])
def test_an_output_in_a_form_that_is_not_offered_is_refused(name: str) -> None:
    with pytest.raises(InvalidError, match="is not offered"):
        parse_infer(body(x(), W, outputs=[{"name": "y", "parameters": {name: 3}}]), INPUTS, OUTPUTS)


def test_messages_stay_short_whatever_they_quote() -> None:
    for sent in (body({**W, "name": "q" * 10**6}), body(x(datatype="q" * 10**6), W), body(x(shape=[1] * 10**5), W)):
        with pytest.raises(InvalidError) as refused:
            parse_infer(sent, INPUTS, OUTPUTS)
        assert len(refused.value.message) < 300
