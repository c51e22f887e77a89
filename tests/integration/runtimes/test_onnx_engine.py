"""The tensor worker: binary tensors, shared runs, deadlines, providers, and files that are no models."""

from __future__ import annotations

import http.client
import json
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from garrison_agent.runtimes.status import Failed, Ready
from tests.integration.runtimes import onnx_models
from tests.integration.runtimes.workers import WatchedWorker, eventually, magika_model, onnx_spec

pytestmark = pytest.mark.integration

HEADER = "Inference-Header-Content-Length"
CALLERS = 32


def infer(
    worker: WatchedWorker, model: str, request: dict[str, Any], data: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, dict[str, Any], bytes]:
    """Return the answer's head, its JSON, and the binary data behind it."""
    head = json.dumps(request).encode()
    connection = worker.connect()
    try:
        named = {**({HEADER: str(len(head))} if data else {}), **(headers or {})}
        connection.request("POST", f"/v2/models/{model}/infer", head + data, named)
        response = connection.getresponse()
        body = response.read()
        length = int(response.headers.get(HEADER, len(body)))
        return response, json.loads(body[:length]), body[length:]
    finally:
        connection.close()


def floats(values: np.ndarray[Any, Any]) -> tuple[dict[str, Any], bytes]:
    """Return a request for ``layers``, all of it in binary."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(values.shape)}
    sized = {**tensor, "parameters": {"binary_data_size": values.nbytes}}
    return {"inputs": [sized], "parameters": {"binary_data_output": True}}, values.tobytes()


@pytest.fixture(scope="module")
def layers(short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedWorker]:
    path = onnx_models.layers(tmp_path_factory.mktemp("layers") / "model.onnx")
    with WatchedWorker(onnx_spec(path, short_folder / "layers.sock", model_id="layers:1")) as worker:
        worker.ready()
        yield worker


@pytest.fixture(scope="module")
def echo(short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedWorker]:
    path = onnx_models.echo(tmp_path_factory.mktemp("echo") / "model.onnx")
    with WatchedWorker(onnx_spec(path, short_folder / "echo.sock", model_id="echo:1")) as worker:
        worker.ready()
        yield worker


# --- binary tensors --------------------------------------------------------------------------------------------------


def test_binary_tensors_give_the_same_answer_as_json(magika_worker: WatchedWorker) -> None:
    values = [number * 7 % 256 for number in range(2048)]
    tensor = {"name": "bytes", "shape": [1, 2048], "datatype": "INT32"}
    _, plain, _ = infer(magika_worker, "magika", {"inputs": [{**tensor, "data": values}]})
    raw = struct.pack("<2048i", *values)
    request = {"id": "7", "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}]}
    response, answer, data = infer(magika_worker, "magika", {**request, "outputs": [{"name": "target_label"}]}, raw)
    assert (response.headers["content-type"], data) == ("application/json", b"")
    assert (answer["id"], answer["outputs"]) == ("7", plain["outputs"])
    asked = [{"name": "target_label", "parameters": {"binary_data": True}}]
    response, answer, data = infer(magika_worker, "magika", {**request, "outputs": asked}, raw)
    assert response.headers["content-type"] == "application/octet-stream"
    (output,) = answer["outputs"]
    assert output["parameters"] == {"binary_data_size": len(data)}
    assert np.frombuffer(data, "<f4").tolist() == plain["outputs"][0]["data"]


def test_strings_and_not_a_number_pass_in_binary_both_ways(echo: WatchedWorker) -> None:
    strings = b"\2\0\0\0\xc3\xa9\3\0\0\0a\0b"
    numbers = struct.pack("<2f", float("nan"), float("inf"))
    request: dict[str, Any] = {
        "inputs": [
            {"name": "f", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": len(numbers)}},
            {"name": "s", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(strings)}},
        ],
        "outputs": [{"name": "s_", "parameters": {"binary_data": True}}, {"name": "f_"}],
    }
    response, answer, _ = infer(echo, "echo", request, numbers + strings)
    assert (response.status, answer["code"]) == (500, "oip.not_finite")
    request["outputs"][1]["parameters"] = {"binary_data": True}
    response, answer, data = infer(echo, "echo", request, numbers + strings)
    assert [output["name"] for output in answer["outputs"]] == ["s_", "f_"]
    assert data == strings + numbers


def test_the_server_says_that_it_takes_binary_tensors(echo: WatchedWorker) -> None:
    assert echo.call("GET", "/v2")[1]["extensions"] == ["binary_tensor_data"]


@pytest.mark.parametrize("length", ["x", "-1", "99999999"])
def test_a_wrong_header_is_refused_with_a_code(echo: WatchedWorker, length: str) -> None:
    response, answer, _ = infer(echo, "echo", {"inputs": []}, headers={HEADER: length})
    assert (response.status, answer["code"]) == (400, "oip.malformed")


# --- shared runs -----------------------------------------------------------------------------------------------------


def test_parallel_requests_share_runs_and_each_gets_the_answer_that_it_gets_alone(layers: WatchedWorker) -> None:
    facts = layers.ready().metadata["batching"]
    assert facts["on"], facts
    chance = np.random.default_rng(1)
    rows = [chance.random((1 + number % 2, onnx_models.WIDTH), np.float32) for number in range(CALLERS)]

    def ask(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        response, _, data = infer(layers, "layers", *floats(row))
        assert response.status == 200
        return np.frombuffer(data, "<f4").reshape(row.shape)

    alone = [ask(row) for row in rows]
    barrier = threading.Barrier(CALLERS)

    def rush(row: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        barrier.wait()
        return [ask(row) for _ in range(8)]

    before = layers.health()
    with ThreadPoolExecutor(CALLERS) as callers:
        together = list(callers.map(rush, rows))
    after = layers.health()
    for expected, got in zip(alone, together, strict=True):
        for one in got:
            np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)
    assert after["requests"] - before["requests"] == CALLERS * 8
    assert after["runs"] - before["runs"] < CALLERS * 8


def test_a_request_has_no_more_rows_than_the_package_allows(magika_worker: WatchedWorker) -> None:
    def ask(rows: int) -> tuple[int, Any]:
        tensor = {"name": "bytes", "shape": [rows, 2048], "datatype": "INT32", "data": [7] * (rows * 2048)}
        return magika_worker.call("POST", "/v2/models/magika/infer", {"inputs": [tensor]})

    status, answer = ask(65)
    assert status == 400
    assert "has 65 rows; one request takes 64" in answer["error"]
    status, answer = ask(2)
    assert status == 200
    assert answer["outputs"][0]["shape"] == [2, 214]


def test_batching_may_be_switched_off(short_folder: Path, tmp_path: Path) -> None:
    path = onnx_models.layers(tmp_path / "model.onnx", depth=1)
    spec = onnx_spec(path, short_folder / "off.sock", settings={"batching": False, "memory_arena": "shrink"})
    with WatchedWorker(spec) as worker:
        facts = worker.ready().metadata
        assert facts["batching"] == {"on": False, "rows": 1, "why": "model_settings switch it off"}
        assert facts["providers"] == ["CPUExecutionProvider"]
        response, _, _ = infer(worker, "layers", *floats(np.ones((1, onnx_models.WIDTH), np.float32)))
        assert response.status == 200


# --- deadlines and clients that leave --------------------------------------------------------------------------------


def count_to(number: int) -> dict[str, Any]:
    return {"inputs": [{"name": "n", "datatype": "INT64", "shape": [], "data": [number]}]}


def test_a_run_ends_with_its_time_and_with_its_client(short_folder: Path, tmp_path: Path) -> None:
    path = onnx_models.counting(tmp_path / "model.onnx")
    spec = onnx_spec(path, short_folder / "count.sock", settings={"request_timeout_s": 1})
    with WatchedWorker(spec) as worker:
        worker.ready()
        assert infer(worker, "counting", count_to(3))[1]["outputs"][0]["data"] == [3]
        for headers in ({"X-Garrison-Timeout-Ms": "50"}, {}):
            response, answer, _ = infer(worker, "counting", count_to(2**62), headers=headers)
            assert (response.status, answer["code"]) == (504, "inference.deadline_exceeded")
            assert infer(worker, "counting", count_to(3))[1]["outputs"][0]["data"] == [3]
        connection = worker.connect()
        connection.request("POST", "/v2/models/counting/infer", json.dumps(count_to(2**62)).encode())
        eventually(lambda: worker.health()["active"] == 1, "the run has begun")
        connection.close()
        assert infer(worker, "counting", count_to(4))[1]["outputs"][0]["data"] == [4]
        codes = [worker.record(count=number).error_code for number in range(1, 8)]
        late = "inference.deadline_exceeded"
        # a client that left is recorded when its run has ended, maybe behind the next one
        assert codes[:5] == [None, late, None, late, None]
        assert set(codes[5:]) == {None, "inference.client_disconnected"}


# --- providers and settings ------------------------------------------------------------------------------------------


def test_what_is_not_there_is_replaced_by_the_cpu_and_the_facts_say_why(short_folder: Path, tmp_path: Path) -> None:
    path = onnx_models.echo(tmp_path / "model.onnx")
    wanted = "CUDAExecutionProvider, AzureExecutionProvider,CPUExecutionProvider"
    with WatchedWorker(onnx_spec(path, short_folder / "p.sock", execution_provider=wanted)) as worker:
        facts = worker.ready().metadata
    assert facts["providers"] == ["CPUExecutionProvider"]
    assert list(facts["providers_missing"]) == ["CUDAExecutionProvider", "AzureExecutionProvider"]
    assert "lacks it" in facts["providers_missing"]["CUDAExecutionProvider"]
    assert "network" in facts["providers_missing"]["AzureExecutionProvider"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (
            {"execution_provider": "CUDAExecutionProvider", "settings": {"required_provider": True}},
            "model.provider_unavailable",
        ),
        ({"settings": {"graph_optimization": "most"}}, "manifest.malformed"),
        ({"settings": {"request_timeout_s": 0}}, "manifest.malformed"),
        ({"settings": {"batching": "yes"}}, "manifest.malformed"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    short_folder: Path, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    path = onnx_models.echo(tmp_path / "model.onnx")
    with WatchedWorker(onnx_spec(path, short_folder / "s.sock", **changes)) as worker:
        assert worker.failed().code == code


# --- files that are no models ----------------------------------------------------------------------------------------


def damaged(how: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    whole = magika_model().read_bytes()
    match how:
        case "empty":
            path.write_bytes(b"")
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case "one byte short":
            path.write_bytes(whole[:-1])
        case "head overwritten":
            path.write_bytes(b"\xff" * 64 + whole[64:])
        case "text":
            path.write_bytes(b"this is no model\n" * 100)
        case "oversized":
            onnx_models.oversized(path)
    return path


@pytest.mark.parametrize("how", ["empty", "half", "one byte short", "head overwritten", "text", "oversized"])
def test_a_file_that_is_no_model_is_said_to_be_none(short_folder: Path, tmp_path: Path, how: str) -> None:
    with WatchedWorker(onnx_spec(damaged(how, tmp_path), short_folder / "d.sock")) as worker:
        failed = worker.failed()
        assert failed.code == "model.load_failed"
        assert failed.message.startswith("ONNX Runtime cannot load this file")
        assert len(failed.message) < 600


def test_flipped_bytes_inside_never_leave_a_worker_in_between(short_folder: Path, tmp_path: Path) -> None:
    """What the digest cannot catch: a package signed with damaged weights. It loads, or says why not."""
    whole = bytearray(magika_model().read_bytes())
    for place in range(1000, len(whole), len(whole) // 40):
        whole[place] ^= 0xFF
    path = tmp_path / "model.onnx"
    path.write_bytes(whole)
    with WatchedWorker(onnx_spec(path, short_folder / "f.sock")) as worker:
        eventually(lambda: len(worker.events) > 1, "it is ready, or has failed")
        word = worker.events[1]
    assert isinstance(word, Ready) or (isinstance(word, Failed) and word.code == "model.load_failed")
