"""Small ONNX models, made for one property each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 512


def write(path: Path, graph: onnx.GraphProto) -> Path:
    """Write ``graph`` as a model to ``path`` and return it."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def layers(path: Path, depth: int = 4) -> Path:
    """Rows of ``WIDTH`` floats through matrices: reading these costs more than one row's arithmetic."""
    chance = np.random.default_rng(5)
    nodes, weights, name = [], [], "x"
    for number in range(depth):
        matrix = (chance.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [f"m{number}"]))
        nodes.append(helper.make_node("Tanh", [f"m{number}"], ["y" if number == depth - 1 else f"t{number}"]))
        name = f"t{number}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", WIDTH])
    return write(path, helper.make_graph(nodes, "layers", [x], [y], weights))


def counting(path: Path) -> Path:
    """Counts up from 0 to ``n``, one by one: 2**62 never ends."""
    before = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("sum", TensorProto.INT64, []),
    ]
    after = [
        helper.make_tensor_value_info("on_", TensorProto.BOOL, []),
        helper.make_tensor_value_info("sum_", TensorProto.INT64, []),
    ]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["on_"]),
            helper.make_node("Add", ["sum", "one"], ["sum_"]),
        ],
        "body",
        before,
        after,
        [helper.make_tensor("one", TensorProto.INT64, [], [1])],
    )
    n = helper.make_tensor_value_info("n", TensorProto.INT64, [])
    total = helper.make_tensor_value_info("total", TensorProto.INT64, [])
    begin = [
        helper.make_tensor("zero", TensorProto.INT64, [], [0]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [1]),
    ]
    loop = helper.make_node("Loop", ["n", "yes", "zero"], ["total"], body=body)
    return write(path, helper.make_graph([loop], "counting", [n], [total], begin))


def echo(path: Path) -> Path:
    """Gives back a tensor of strings and one of floats."""
    pairs = {"s": TensorProto.STRING, "f": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in pairs.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_", kind, ["n"]) for name, kind in pairs.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_"]) for name in pairs]
    return write(path, helper.make_graph(nodes, "echo", inputs, outputs))


def oversized(path: Path) -> Path:
    """Claims four TiB of weights, and holds four bytes."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**40], raw_data=b"\0\0\0\0")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    return write(path, helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "big", [x], [y], [weights]))
