"""Binary tensors from a client through the agent to a real worker, and back."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from garrison_agent.runtimes.gate import UnixConnection
from garrison_protocol.states import Engine
from tests.fakes.local_owner import LocalOwner, make_route
from tests.integration.runtimes.workers import WatchedWorker, magika_model, onnx_spec
from tests.integration.surfaces import DEADLINE_S, call, serving

pytestmark = pytest.mark.integration


def test_binary_tensors_pass_through_the_agent_both_ways(tmp_path: Path) -> None:
    values = [number * 7 % 256 for number in range(2048)]
    tensor = {"name": "bytes", "shape": [1, 2048], "datatype": "INT32"}
    data = struct.pack("<2048i", *values)
    head = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    with WatchedWorker(onnx_spec(magika_model(), tmp_path / "w.sock")) as worker:
        worker.ready()
        route = make_route("files", socket=tmp_path / "w.sock", name="magika", engine=Engine.ONNXRUNTIME)
        with serving(LocalOwner(route), tmp_path / "agent.sock") as api:
            assert call(api, "GET", "/v2")[1]["extensions"] == ["binary_tensor_data"]
            connection = UnixConnection(tmp_path / "agent.sock", DEADLINE_S)
            headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
            connection.request("POST", "/v2/models/files/infer", head + data, headers)
            response = connection.getresponse()
            body = response.read()
            connection.close()
            status, plain = call(api, "POST", "/v2/models/files/infer", {"inputs": [{**tensor, "data": values}]})
            refused, _ = call(api, "POST", "/v2/models/files/infer", {"inputs": []})
    assert (response.status, response.headers["content-type"], status) == (200, "application/octet-stream", 200)
    length = int(response.headers["inference-header-content-length"])
    (output,) = json.loads(body[:length])["outputs"]
    assert list(struct.unpack(f"<{output['shape'][1]}f", body[length:])) == plain["outputs"][0]["data"]
    assert refused == 400
