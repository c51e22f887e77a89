"""Files that were damaged before they were signed: the worker says so, or serves; it never hangs or stays behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import onnx
import pytest
from onnx import TensorProto, helper

from garrison_agent.runtimes.process import Exited, Failed, Ready
from garrison_agent.runtimes.spec import WorkerSpec
from tests.integration.runtimes.tiny_models import tiny_llama
from tests.integration.runtimes.workers import WatchedWorker, llama_spec, onnx_spec

pytestmark = pytest.mark.integration

PARALLEL = 2


def tiny_onnx(path: Path) -> Path:
    """Write y = relu(x @ w) + b."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, (4, 4), [0.5] * 16)
    bias = helper.make_tensor("b", TensorProto.FLOAT, (4,), [1.0] * 4)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Add", ["r", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "tiny", [ends[0]], [ends[1]], [weights, bias])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def gguf_regions(path: Path) -> dict[str, tuple[int, int]]:
    """Return where header and metadata, the table of tensors, and the weights of a GGUF file lie."""
    reader = gguf.GGUFReader(str(path))
    table = min(int(tensor.field.offset) for tensor in reader.tensors)
    return {
        "header": (0, table),
        "table": (table, reader.data_offset),
        "weights": (reader.data_offset, path.stat().st_size),
    }


def flipped(data: bytes, region: tuple[int, int], chance: random.Random, *, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[chance.randrange(*region)] ^= 1 << chance.randrange(8)
    return bytes(changed)


@contextmanager
def started(specs: list[WorkerSpec]) -> Iterator[list[WatchedWorker]]:
    workers = [WatchedWorker(spec) for spec in specs]
    for worker in workers:
        worker.__enter__()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.__exit__()


def outcome(worker: WatchedWorker, use: Callable[[WatchedWorker], Any]) -> str:
    """Wait until the worker has failed, or is ready and was used; return what came of it."""
    answered = worker.wait_for_first(Failed, Ready)
    if isinstance(answered, Failed):
        worker.expect(Exited)
        assert answered.code == "model.load_failed", answered
        return "failed"
    try:
        status, _ = use(worker)
    except OSError:
        worker.expect(Exited)  # it crashed on its first request, and its socket went with it
        return "crashed"
    assert status in (200, 400, 500, 503), status
    return "served" if status == 200 else "refused"


def try_all(
    contents: list[bytes],
    folder: Path,
    spec_of: Callable[..., WorkerSpec],
    sockets: Path,
    use: Callable[[WatchedWorker], Any],
) -> list[str]:
    found = []
    for start in range(0, len(contents), PARALLEL):
        specs = []
        for index, content in enumerate(contents[start : start + PARALLEL], start):
            path = folder / f"{index}.model"
            path.write_bytes(content)
            specs.append(spec_of(path, sockets / f"d{index}.sock"))
        with started(specs) as workers:
            found += [outcome(worker, use) for worker in workers]
    return found


def complete(worker: WatchedWorker) -> tuple[int, Any]:
    return worker.call("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 3, "temperature": 0})


def infer(worker: WatchedWorker) -> tuple[int, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 2.0, 3.0, 4.0]}
    return worker.call("POST", "/v2/models/magika/infer", {"inputs": [tensor]})


def tiny_spec(path: Path, socket: Path) -> WorkerSpec:
    return llama_spec(path, socket, context_length=64, parallel=1)


def test_the_whole_files_serve(tmp_path: Path, short_folder: Path) -> None:
    whole = tiny_llama(tmp_path / "whole.gguf").read_bytes()
    assert try_all([whole], tmp_path, tiny_spec, short_folder, complete) == ["served"]
    model = tiny_onnx(tmp_path / "whole.onnx").read_bytes()
    assert try_all([model], tmp_path, onnx_spec, short_folder, infer) == ["served"]


def test_a_gguf_cut_short_anywhere_fails(tmp_path: Path, short_folder: Path) -> None:
    path = tiny_llama(tmp_path / "whole.gguf")
    data, regions = path.read_bytes(), gguf_regions(path)
    ends = [3, 20, regions["header"][1] // 2, sum(regions["table"]) // 2, sum(regions["weights"]) // 2, len(data) - 1]
    found = try_all([data[:end] for end in ends], tmp_path, tiny_spec, short_folder, complete)
    assert found == ["failed"] * len(ends)


@pytest.mark.parametrize(("region", "files", "flips"), [("header", 8, 3), ("table", 8, 2), ("weights", 2, 40)])
def test_a_gguf_with_flipped_bits_fails_or_serves(
    region: str, files: int, flips: int, tmp_path: Path, short_folder: Path
) -> None:
    path = tiny_llama(tmp_path / "whole.gguf")
    data, where = path.read_bytes(), gguf_regions(path)[region]
    chance = random.Random(7)
    contents = [flipped(data, where, chance, count=flips) for _ in range(files)]
    found = try_all(contents, tmp_path, tiny_spec, short_folder, complete)
    if region == "weights":
        assert "failed" not in found, "nothing in the file tells: that is what the digest and the gate are for"
    else:
        assert "failed" in found


def test_an_onnx_file_that_is_cut_short_or_flipped_fails_or_serves(tmp_path: Path, short_folder: Path) -> None:
    data = tiny_onnx(tmp_path / "whole.onnx").read_bytes()
    chance = random.Random(7)
    contents = [data[: len(data) * part // 4] for part in range(1, 4)]
    contents += [flipped(data, (0, len(data)), chance, count=3) for _ in range(9)]
    found = try_all(contents, tmp_path, onnx_spec, short_folder, infer)
    assert "failed" in found
    assert len(found) == 12
