"""The tensor worker with the real Magika: the Open Inference Protocol, and the same answers as magika's own package."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from magika import Magika

from tests.integration.runtimes.workers import WatchedWorker, magika_model, onnx_spec, package_file

pytestmark = pytest.mark.integration

INFER = "/v2/models/magika/infer"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "hello " * 50)
    return buffer.getvalue()


FILES = {
    "python": Path(__file__).read_bytes(),
    "onnx": magika_model().read_bytes(),
    "json": b'{"name": "garrison", "tags": ["edge", "fleet"], "on": true, "off": null, "n": [1, 2, 3]}\n' * 20,
    "shell": b'#!/bin/sh\nset -eu\nfor file in *.log; do\n  gzip -9 "$file"\ndone\n',
    "c": b'#include <stdio.h>\n\nint main(int argc, char **argv) {\n    printf("%s\\n", argv[0]);\n    return 0;\n}\n',
    "xml": b'<?xml version="1.0"?>\n<catalog>\n  <book id="1"><title>One</title></book>\n</catalog>\n',
    "zip": zipped(),
    "csv": b"id,name,price\n1,apple,0.5\n2,pear,0.75\n3,plum,0.25\n",
}


def config() -> dict[str, Any]:
    loaded = json.loads(package_file("magika", "models/standard_v3_3/config.min.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def features(data: bytes) -> list[int]:
    """Return Magika's input: the stripped first and last 1024 bytes, padded with 256 (magika 1.0.3, v3.3)."""
    near = min(4096, len(data))
    begin = list(data[:near].lstrip()[:1024])
    end = list(data[len(data) - near :].rstrip()[-1024:])
    return begin + [256] * (1024 - len(begin)) + [256] * (1024 - len(end)) + end


def tensor(data: list[int], **changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "bytes", "shape": [1, 2048], "datatype": "INT32", "data": data, **changes}]}


@pytest.mark.parametrize("name", FILES)
def test_every_file_gets_the_label_and_score_of_the_magika_package(magika_worker: WatchedWorker, name: str) -> None:
    answer = magika_worker.post(INFER, {**tensor(features(FILES[name])), "id": name})
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("magika", "1.0.0", name)
    (output,) = answer["outputs"]
    labels = config()["target_labels_space"]
    assert (output["name"], output["datatype"], output["shape"]) == ("target_label", "FP32", [1, len(labels)])
    best = int(np.argmax(output["data"]))
    reference = Magika().identify_bytes(FILES[name])
    assert labels[best] == str(reference.dl.label)
    assert output["data"][best] == pytest.approx(reference.score, abs=1e-4)


def test_the_model_tells_its_tensors(magika_worker: WatchedWorker) -> None:
    for path in ("/v2/models/magika", "/v2/models/magika/versions/1.0.0"):
        status, answer = magika_worker.call("GET", path)
        assert status == 200
        assert (answer["name"], answer["versions"], answer["platform"]) == ("magika", ["1.0.0"], "onnxruntime_onnx")
        assert answer["inputs"] == [{"name": "bytes", "datatype": "INT32", "shape": [-1, 2048]}]
        assert [output["name"] for output in answer["outputs"]] == ["target_label"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/magika/ready", {"name": "magika", "ready": True}),
        ("/v2/models/magika/versions/1.0.0/ready", {"name": "magika", "ready": True}),
    ],
)
def test_health(magika_worker: WatchedWorker, path: str, expected: dict[str, Any]) -> None:
    assert magika_worker.call("GET", path) == (200, expected)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (INFER, b"{", 400, "oip.malformed"),
        (INFER, {"inputs": []}, 400, "oip.input_missing"),
        (INFER, tensor([0] * 2048, name="byte"), 400, "oip.input_unknown"),
        (INFER, tensor([0] * 2048, datatype="FP32"), 400, "oip.datatype_mismatch"),
        (INFER, tensor([0] * 2048, shape=[2048]), 400, "oip.shape_mismatch"),
        (INFER, tensor([0] * 2047, shape=[1, 2047]), 400, "oip.shape_mismatch"),
        (INFER, tensor([0] * 2047), 400, "oip.data_mismatch"),
        (INFER, {**tensor([0] * 2048), "outputs": [{"name": "label"}]}, 400, "oip.output_unknown"),
        (INFER, b" " * (16 * 1024 * 1024 + 1), 413, "oip.body_too_large"),
        ("/v2/models/magika/versions/2/infer", tensor([0] * 2048), 404, "oip.version_unknown"),
        ("/v2/models/magika/explain", {}, 404, "oip.unknown_path"),
        ("/v1/chat/completions", {}, 404, "oip.unknown_path"),
    ],
)
def test_what_is_wrong_is_said_with_a_code(
    magika_worker: WatchedWorker, path: str, body: object, status: int, code: str
) -> None:
    got, answer = magika_worker.call("POST", path, body)
    assert (got, answer["code"]) == (status, code)
    assert isinstance(answer["error"], str)


def test_requests_are_recorded_and_the_gates_own_are_not(short_folder: Path) -> None:
    with WatchedWorker(onnx_spec(magika_model(), short_folder / "w.sock")) as worker:
        worker.ready()
        worker.post("/internal" + INFER, tensor([0] * 2048))
        worker.post(INFER, tensor([0] * 2048))
        worker.call("POST", INFER, tensor([0]))
        answered, refused = worker.record(), worker.record(count=2)
        assert (answered.kind, answered.ok, answered.status) == ("infer", True, 200)
        assert answered.duration_ms > 0
        assert (refused.ok, refused.error_code, refused.status) == (False, "oip.data_mismatch", 400)
        assert worker.health()["requests"] == 3


def test_outputs_that_json_cannot_carry_are_an_error(tmp_path: Path, short_folder: Path) -> None:
    """The square root of a negative number, through a model of one node."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Sqrt", ["x"], ["y"])], "root", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "root.onnx"
    path.write_bytes(model.SerializeToString())
    with WatchedWorker(onnx_spec(path, short_folder / "w.sock")) as worker:
        worker.ready()

        def root(value: float) -> tuple[int, Any]:
            body = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [value]}]}
            return worker.call("POST", "/v2/models/root/infer", body)

        status, answer = root(9)
        assert (status, answer["outputs"][0]["data"]) == (200, [3.0])
        status, answer = root(-1)
        assert (status, answer["code"]) == (500, "oip.not_finite")
        assert worker.record(count=2).status == 500
