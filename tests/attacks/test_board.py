"""Attacks on the board itself: its disk, its keys, its local API; by other users, by programs, by web pages."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from garrison_agent.api import guards
from garrison_agent.api.asgi import BodyBudget, Peer, Request
from garrison_agent.api.server import LocalApi
from garrison_agent.identity import Folders, Identity
from garrison_agent.runtimes.openai.chat_template import ChatTemplate
from garrison_agent.runtimes.status import Verified, WorkerEvent
from garrison_protocol.errors import DeniedError, GarrisonError, RefusedError
from garrison_protocol.keys import SigningKey
from tests.attacks import standing
from tests.fakes.local_owner import LocalOwner, make_route
from tests.integration.runtimes.workers import WatchedWorker, onnx_spec

NOBODY = 65534
INFER = "/v2/models/magika/infer"
ONE = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="garrison-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


# --- the disk --------------------------------------------------------------------------------------------------------


def adding(number: float, path: Path) -> Path:
    """Write a real model that adds ``number`` to its input."""
    tensor = numpy_helper.from_array(np.array([number], dtype=np.float32), "n")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "n"], ["y"])],
        "adding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


class SwappedWhenVerified(WatchedWorker):
    """A worker whose model's path leads to another model from the moment that its bytes are verified."""

    swap: Path

    def _hear(self, event: WorkerEvent) -> None:
        if isinstance(event, Verified):
            os.replace(self.swap, self.spec.files[0].disk_path)
        super()._hear(event)


@pytest.mark.integration
def test_a_model_file_swapped_between_verification_and_load(folder: Path) -> None:
    """Swap: the model's file is replaced by another valid model after its digest was checked, before it is loaded."""
    honest, hostile = adding(1, folder / "model.onnx"), adding(666, folder / "hostile.onnx")
    watched = SwappedWhenVerified(onnx_spec(honest, folder / "w.sock"))
    watched.swap = hostile
    with watched as worker:
        worker.ready()
        assert not hostile.exists()  # it took the honest one's place
        assert worker.post(INFER, ONE)["outputs"][0]["data"] == [2.0]
    with WatchedWorker(watched.spec) as again:  # the next load sees the swapped file, and refuses it
        assert again.failed().code == "model.digest_mismatch"


@pytest.mark.integration
def test_a_model_file_changed_with_its_times_put_back(folder: Path) -> None:
    """Silent change: a model's file is changed in place, size and times as before, while the model is not loaded."""
    model = adding(1, folder / "model.onnx")
    spec, before = onnx_spec(model, folder / "w.sock"), model.stat()
    data = model.read_bytes()
    adding(2, model)
    assert len(model.read_bytes()) == len(data)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    with WatchedWorker(spec) as worker:
        assert worker.failed().code == "model.digest_mismatch"


@pytest.mark.integration
def test_a_model_file_replaced_by_a_link(folder: Path) -> None:
    """Symbolic link: a model's file is replaced by a link to a secret, which a tensor or an error might show."""
    model, secret = adding(1, folder / "model.onnx"), folder / "secret"
    spec = onnx_spec(model, folder / "w.sock")
    secret.write_bytes(b"the secret's text")
    model.unlink()
    model.symlink_to(secret)
    with WatchedWorker(spec) as worker:
        failed = worker.failed()
    assert failed.code == "model.digest_mismatch"
    assert "the secret" not in failed.message


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def enrolled(tmp_path: Path) -> Folders:
    """The identity of an enrolled board."""
    folders = Folders(tmp_path)
    folders.identity.mkdir(parents=True)
    SigningKey.generate().save(folders.signing_key)
    SigningKey.generate().save(folders.tls_pair)
    record = {"device": "edge-1", "url": "https://x", "mqtt_host": "x", "mqtt_port": 1, "token_sha256": "0" * 64}
    folders.record.write_text(json.dumps(record))
    Identity.load(tmp_path)
    return folders


@pytest.mark.parametrize("name", ["signing_key", "tls_pair"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o622], ids=oct)
def test_a_private_key_that_others_may_read(enrolled: Folders, name: str, mode: int) -> None:
    """World-readable keys: a board's private key was copied about and can be read or written by others."""
    key: Path = getattr(enrolled, name)
    key.chmod(mode)
    before = standing.files(enrolled.state)
    with pytest.raises(RefusedError) as caught:
        Identity.load(enrolled.state)
    assert caught.value.code == "key.readable_by_others"
    assert standing.files(enrolled.state) == before
    assert key.stat().st_mode & 0o777 == mode  # nothing is quietly put right: the key may be known by now


def test_an_online_key_that_others_may_read(tmp_path: Path) -> None:
    """World-readable keys: the controller's director key can be read by others."""
    key = tmp_path / "director.key"
    SigningKey.generate().save(key)
    key.chmod(0o644)
    with pytest.raises(RefusedError) as caught:
        SigningKey.load(key)
    assert caught.value.code == "key.readable_by_others"


# --- other users -----------------------------------------------------------------------------------------------------

CALL = """
import os, socket, sys
user = int(sys.argv[2])
os.setgroups([]); os.setgid(user); os.setuid(user)
with socket.socket(socket.AF_UNIX) as door:
    try:
        door.connect(sys.argv[1])
    except PermissionError:
        sys.exit("no entry")
    door.sendall(b"POST /garrison/v1/models/chat/unload HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    while part := door.recv(65536):
        print(part.decode(), end="")
"""


def call_as(user: int, path: Path) -> str:
    """Return what another user gets who asks the agent to unload a model. Root becomes that user in a new process."""
    # Started first: the interpreter may lie where the other user may not go.
    command = [sys.executable, "-I", "-S", "-c", CALL, str(path), str(user)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def owner() -> LocalOwner:
    return LocalOwner(make_route())


@pytest.fixture
def api(folder: Path, owner: LocalOwner) -> Iterator[LocalApi]:
    running = LocalApi(
        host="127.0.0.1", port=0, tcp_open=True, socket=folder / "agent.sock", table=owner.read, command=owner.post
    )
    running.start()
    yield running
    running.stop()


def test_another_user_at_the_socket(
    api: LocalApi, owner: LocalOwner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user of the board asks the agent, over its socket, to unload a model.

    As root, the user is really another one, who is kept out twice: by the socket's mode, and where that was widened,
    by what the kernel says of him. An ordinary user cannot become another; there the very same connection meets a
    socket that belongs to root's group and an agent that runs as root, which is the same question the other way round.
    """
    door = folder / "agent.sock"
    assert door.stat().st_mode & 0o777 == 0o660
    if os.geteuid() == 0:
        assert "no entry" in call_as(NOBODY, door)
        door.chmod(0o666)
        answer = call_as(NOBODY, door)
        assert answer.startswith("HTTP/1.1 403 ")
        assert "api.not_permitted" in answer
    else:
        near, far = socket.socketpair(socket.AF_UNIX)
        with near, far:
            peer = guards.peer_of(near)
        assert peer.uid == os.getuid()
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        with pytest.raises(DeniedError) as caught:
            guards.check_manager(request_of(peer), Path("/"))  # "/" belongs to root's group
        assert caught.value.code == "api.not_permitted"
    assert owner.commands == []


def request_of(peer: Peer) -> Request:
    """Return a request that came from ``peer``."""

    async def nothing(*_: object) -> dict[str, object]:
        return await asyncio.sleep(0, {})

    scope = {"method": "POST", "path": "/garrison/v1/models/chat/unload", "headers": []}
    return Request(scope, nothing, nothing, BodyBudget(), peer)  # type: ignore[arg-type] # nothing is sent


def call_tcp(api: LocalApi, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Return status and error code of one request over TCP."""
    host = api.endpoints[0].removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request(method, path, b"", headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("method_path", ["POST models/chat/load", "POST models/chat/unload", "DELETE cache/chat:1.0"])
def test_managing_over_tcp(api: LocalApi, owner: LocalOwner, method_path: str) -> None:
    """A program of any user, or a container with the host's network, manages the agent over TCP."""
    method, path = method_path.split()
    status, answer = call_tcp(api, method, f"/garrison/v1/{path}", {})
    assert status == 403
    assert "api.management_needs_socket" in answer
    assert owner.commands == []


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "api.host_refused"),
        ({"Host": "127.0.0.1.evil.example"}, "api.host_refused"),
        ({"Origin": "https://evil.example"}, "api.origin_refused"),
        ({"Origin": "null"}, "api.origin_refused"),
        ({"Origin": "http://localhost.evil.example"}, "api.origin_refused"),
    ],
    ids=["rebinding", "prefix", "origin", "null", "subdomain"],
)
def test_a_web_page_elsewhere(api: LocalApi, owner: LocalOwner, headers: dict[str, str], code: str) -> None:
    """DNS rebinding and cross-site requests: a web page, open on the board, talks to the local API."""
    status, answer = call_tcp(api, "GET", "/v1/models", headers)
    assert (status, code in answer) == (403, True)
    assert owner.commands == []


def test_a_request_larger_than_memory(api: LocalApi, owner: LocalOwner) -> None:
    """Exhaustion: a local program announces, and begins to send, a request body of a terabyte."""
    status, answer = call_tcp(api, "POST", "/v1/chat/completions", {"Content-Length": str(10**12)})
    assert (status, "request_too_large" in answer) == (413, True)
    assert owner.commands == []


def test_deeply_nested_json_at_the_local_api(api: LocalApi, owner: LocalOwner) -> None:
    """Deeply nested JSON: a local program sends a hundred thousand brackets as a chat."""
    host = api.endpoints[0].removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request("POST", "/v1/chat/completions", b"[" * 100_000)
        response = connection.getresponse()
        assert (response.status, "bad_json" in response.read().decode()) == (400, True)
    finally:
        connection.close()
    assert owner.commands == []


@pytest.mark.integration
@pytest.mark.parametrize("how", ["absolute", "beside", "upwards"])
def test_an_onnx_model_that_reads_other_files(folder: Path, how: str) -> None:
    """Data outside of the model: a signed ONNX model takes its weights from another, unsigned file of the board."""
    secret = folder / "secret.bin"
    secret.write_bytes(np.array([666], dtype=np.float32).tobytes())
    location = {"absolute": str(secret), "beside": secret.name, "upwards": f"../../../../..{secret}"}[how]
    model = onnx.load(adding(1, folder / "model.onnx"))
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        weights.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with WatchedWorker(onnx_spec(folder / "model.onnx", folder / "w.sock")) as worker:
        assert worker.failed().code == "model.load_failed"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10**16 }}",
    ],
    ids=["subclasses", "globals", "self", "change", "shell", "endless", "recursion", "memory"],
)
def test_a_chat_template_that_is_a_program(template: str) -> None:
    """Code in data: the chat template inside a signed model file tries to run code, or to use up the board."""

    async def render() -> None:
        made = ChatTemplate()
        await made.load(template, begin_text="", end_text="")
        try:
            await made.render([{"role": "user", "content": "hello"}])
        finally:
            made.close()

    with pytest.raises(GarrisonError) as caught:
        asyncio.run(render())
    assert caught.value.code in ("inference.messages_refused", "inference.template_failed")
