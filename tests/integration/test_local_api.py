"""The local API against a stand-in worker: real sockets on both sides, the official ``openai`` client in front."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from garrison_agent.api.commands import (
    BeginImport,
    Command,
    Doctor,
    GetExport,
    GetStatus,
    ListCache,
    ListModels,
    LoadModel,
    RemoveFromCache,
    UnloadModel,
    model_view,
)
from garrison_agent.api.routes import RouteTable
from garrison_agent.api.server import LocalApi
from garrison_agent.cli.client import AgentClient
from garrison_protocol.errors import (
    ConflictError,
    GarrisonError,
    InsufficientError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from garrison_protocol.states import Engine
from tests.fakes.local_owner import DIGEST, LocalOwner, make_manifest, make_route
from tests.fakes.worker_server import StandInWorker

pytestmark = pytest.mark.integration

DEADLINE_S = 20.0
Start = Callable[..., LocalApi]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StandInWorker]:
    with StandInWorker(tmp_path / "1.sock") as running:
        yield running


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[LocalApi] = []

    def start_api(owner: LocalOwner, **changes: Any) -> LocalApi:
        settings: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 0,
            "tcp_open": True,
            "socket": tmp_path / "agent.sock",
            "table": owner.read,
            "command": owner.post,
        }
        api = LocalApi(**{**settings, **changes})
        api.start()
        running.append(api)
        return api

    yield start_api
    for api in running:
        api.stop()


@pytest.fixture
def api(start: Start, worker: StandInWorker) -> LocalApi:
    return start(LocalOwner(make_route(socket=worker.path)))


def connect(api: LocalApi, **kwargs: Any) -> http.client.HTTPConnection:
    url = urlsplit(api.endpoints[0])
    assert url.hostname is not None
    return http.client.HTTPConnection(url.hostname, url.port, timeout=DEADLINE_S, **kwargs)


def call(
    api: LocalApi, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, http.client.HTTPResponse]:
    connection = connect(api)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None, response
    finally:
        connection.close()


def chat(prompt: str, *, model: str = "chat", stream: bool = True) -> dict[str, Any]:
    return {"model": model, "stream": stream, "messages": [{"role": "user", "content": prompt}]}


def open_stream(api: LocalApi, prompt: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = connect(api)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat(prompt)).encode())
    return connection, connection.getresponse()


def client(api: LocalApi) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.endpoints[0]}/v1", api_key="none", max_retries=0)


# --- streaming -------------------------------------------------------------------------------------------------------


def test_an_event_reaches_the_client_while_the_worker_still_thinks(api: LocalApi, worker: StandInWorker) -> None:
    connection, response = open_stream(api, "step")
    assert response.headers["content-type"] == "text/event-stream"
    for number in (1, 2, 3):
        worker.seen.release.release()
        assert f"token{number}".encode() in response.readline()
        assert response.readline() == b"\n"
    response.close()
    connection.close()


def test_a_client_that_leaves_stops_the_worker(api: LocalApi, worker: StandInWorker) -> None:
    connection, response = open_stream(api, "step")
    worker.seen.release.release()
    response.readline()
    response.close()
    connection.close()
    assert worker.seen.client_gone.wait(DEADLINE_S)


def test_a_client_that_resets_stops_the_worker(api: LocalApi, worker: StandInWorker) -> None:
    connection, response = open_stream(api, "flood")
    response.read(100_000)
    connection.close()
    response.close()
    assert worker.seen.client_gone.wait(DEADLINE_S)


def test_a_worker_that_dies_in_mid_stream_ends_in_an_error_event(api: LocalApi) -> None:
    connection, response = open_stream(api, "die")
    text = response.read()
    connection.close()
    events = [json.loads(event.removeprefix(b"data: ")) for event in text.split(b"\n\n") if event]
    assert events[0]["choices"][0]["delta"]["content"] == "half"
    assert events[1]["error"]["code"] == "worker.died"
    assert events[1]["error"]["type"] == "server_error"
    assert len(events) == 2  # the half event was dropped, and nothing pretends to be the end


def test_a_killed_worker_process_ends_in_an_error_event(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "killed.sock"
    command = [sys.executable, "-m", "tests.fakes.worker_server", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        api = start(LocalOwner(make_route(socket=path)))
        connection, response = open_stream(api, "step")
        assert b"token1" in response.readline()
        process.send_signal(signal.SIGKILL)
        rest = response.read()
        connection.close()
    assert json.loads(rest.strip().removeprefix(b"data: "))["error"]["code"] == "worker.died"
    status, body, answer = call(api, "POST", "/v1/chat/completions", chat("hello"))
    assert (status, body["error"]["code"]) == (503, "worker.unreachable")
    assert int(answer.headers["retry-after"]) > 0


def test_a_worker_that_dies_before_it_answers_is_a_bad_gateway(api: LocalApi) -> None:
    for prompt in ("die unheard", "garble"):
        status, body, _ = call(api, "POST", "/v1/chat/completions", chat(prompt))
        assert (status, body["error"]["code"]) == (502, "worker.died")


def test_a_slow_reader_slows_the_worker_and_takes_no_memory(api: LocalApi, worker: StandInWorker) -> None:
    url = urlsplit(api.endpoints[0])
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    slow.settimeout(DEADLINE_S)
    slow.connect((url.hostname, url.port))
    body = json.dumps(chat("flood")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)
    assert worker.seen.first_event_sent.wait(DEADLINE_S)

    def sent_until_stalled() -> int:
        last = -1
        while worker.seen.bytes_sent != last:
            last = worker.seen.bytes_sent
            worker.seen.client_gone.wait(0.25)
        return last

    stalled_at = sent_until_stalled()
    assert stalled_at < 12 * 1024 * 1024  # what kernel buffers hold; without back-pressure it never stalls
    read = 0
    while read < 2 * stalled_at:
        read += len(slow.recv(65536))
    assert worker.seen.bytes_sent > stalled_at
    slow.close()
    assert worker.seen.client_gone.wait(DEADLINE_S)


def test_many_streams_at_once_are_kept_apart(api: LocalApi) -> None:
    def ask(number: int) -> bool:
        connection, response = open_stream(api, f"word{number} " * 20)
        text = response.read()
        connection.close()
        return text.count(f'"word{number}"'.encode()) == 20 and text.endswith(b"data: [DONE]\n\n")

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))


def test_one_connection_carries_many_requests(api: LocalApi) -> None:
    connection = connect(api)
    for prompt in ("one two", "three"):
        connection.request("POST", "/v1/chat/completions", json.dumps(chat(prompt)).encode())
        assert connection.getresponse().read().endswith(b"[DONE]\n\n")
    connection.close()


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_openai_client_streams_and_lists_and_understands_errors(api: LocalApi) -> None:
    ai = client(api)
    with ai:
        stream = ai.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "stay at home"}], stream=True
        )
        words = [chunk.choices[0].delta.content for chunk in stream]
        assert words == ["stay", "at", "home"]
        whole = ai.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "as one"}])
        assert whole.choices[0].message.content == "as one"
        assert [model.id for model in ai.models.list()] == ["chat"]
        assert ai.models.retrieve("smollm2:1.0.0").owned_by == "HuggingFaceTB"
        with pytest.raises(openai.NotFoundError) as unknown:
            ai.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hello"}])
        assert unknown.value.code == "model_not_found"
        assert "chat" in unknown.value.message  # the names that would work
        with pytest.raises(openai.BadRequestError) as long:
            ai.chat.completions.create(model="chat", messages=[{"role": "user", "content": "reject"}])
        assert long.value.code == "context_length_exceeded"  # the worker's own error, passed through
        broken = ai.chat.completions.create(model="chat", messages=[{"role": "user", "content": "die"}], stream=True)
        with pytest.raises(openai.APIError, match="worker ended"):
            list(broken)


# --- what the worker gets --------------------------------------------------------------------------------------------


def test_the_worker_gets_the_very_bytes_and_no_credentials(api: LocalApi, worker: StandInWorker) -> None:
    body = b'{ "model" :"chat",\n "messages":[{"role":"user","content":"h\\u00e9"}], "x-unknown": 1.50 }'
    headers = {"Authorization": "Bearer secret", "Cookie": "a=b", "Content-Type": "application/json"}
    headers |= {"x-garrison-app": "root", "x-garrison-timeout-ms": "1"}
    status, _, response = call(api, "POST", "/v1/chat/completions", body, headers)
    assert status == 200
    assert "set-cookie" not in response.headers
    assert worker.seen.requests == [("POST", "/v1/chat/completions", body)]
    sent = worker.seen.headers[0]
    assert sent.keys() == {"host", "connection", "content-length", "content-type", "x-garrison-app"}
    assert sent["x-garrison-app"] == "local"


def test_nothing_of_a_prompt_is_logged(
    api: LocalApi, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        for body in (chat("my-secret words"), chat("my-secret", model="nobody"), b'{"model": "my-secret'):
            call_quietly(api, body)
    out, err = capfd.readouterr()
    assert "my-secret" not in caplog.text + out + err


def call_quietly(api: LocalApi, body: Any) -> None:
    connection = connect(api)
    connection.request("POST", "/v1/chat/completions", body if isinstance(body, bytes) else json.dumps(body).encode())
    connection.getresponse().read()
    connection.close()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_responses_reach_the_worker_and_none_is_kept(api: LocalApi, worker: StandInWorker) -> None:
    body = b'{"model": "chat", "input": "hello"}'
    assert call(api, "POST", "/v1/responses", body)[0] == 200
    assert worker.seen.requests == [("POST", "/v1/responses", body)]
    for method, path in (
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/responses/resp_1/input_items"),
    ):
        status, answer, _ = call(api, method, path)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (
            404,
            "api.response_unknown",
            "response_id",
        )


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "api.bad_json", None),
        (b"{", 400, "api.bad_json", None),
        (b"\xff\xfe", 400, "api.bad_json", None),
        (b"[1]", 400, "api.bad_json", None),
        (b"[" * 100_000, 400, "api.bad_json", None),
        (b'{"messages": []}', 400, "api.model_missing", "model"),
        (b'{"model": 7}', 400, "api.model_missing", "model"),
        (b'{"model": ""}', 400, "api.model_missing", "model"),
        (b'{"model": "gpt-4"}', 404, "model_not_found", None),
        (b'{"model": "tensors"}', 400, "api.wrong_protocol", "model"),
    ],
)
def test_bad_bodies_get_openai_errors(
    start: Start, worker: StandInWorker, body: bytes, status: int, code: str, param: str | None
) -> None:
    tensors = make_route("tensors", socket=worker.path, name="magika", engine=Engine.ONNXRUNTIME)
    api = start(LocalOwner(make_route(socket=worker.path), tensors))
    answered, answer, _ = call(api, "POST", "/v1/chat/completions", body)
    error = answer["error"]
    assert (answered, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert worker.seen.requests == []


def test_a_body_above_the_limit_is_refused_unread(api: LocalApi) -> None:
    connection = connect(api)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-length", str(17 * 1024 * 1024))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    connection.close()


def test_a_chunked_body_above_the_limit_is_refused(api: LocalApi) -> None:
    connection = connect(api)
    mebibyte = b"x" * 1024 * 1024
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    try:
        for _ in range(17):
            connection.send(b"100000\r\n" + mebibyte + b"\r\n")
    except OSError:
        pass  # the server may close while we still send
    response = connection.getresponse()
    assert response.status == 413
    connection.close()


def test_unknown_paths_and_methods(api: LocalApi) -> None:
    assert call(api, "GET", "/nothing")[:2][0] == 404
    status, body, _ = call(api, "GET", "/v1/chat/completions")
    assert (status, body["error"]["code"]) == (405, "api.method_not_allowed")
    assert call(api, "HEAD", "/v1/models")[:2] == (200, None)


# --- loading on demand -----------------------------------------------------------------------------------------------


def test_a_request_loads_its_model_and_waits(start: Start, worker: StandInWorker) -> None:
    owner = LocalOwner(make_route())

    def load(command: Command) -> object:
        owner.table = RouteTable((make_route(socket=worker.path),))
        return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "loaded"}

    owner.answer = load
    api = start(owner)
    status, body, _ = call(api, "POST", "/v1/chat/completions", chat("hello there", model="smollm2", stream=False))
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "hello there"
    assert owner.commands == [LoadModel("chat", waits=True)]


def test_a_load_that_takes_too_long_says_when_to_retry(start: Start) -> None:
    api = start(LocalOwner(make_route()), load_timeout_s=0.05)
    status, body, response = call(api, "POST", "/v1/chat/completions", chat("hello"))
    assert (status, body["error"]["code"]) == (503, "model.loading")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InsufficientError("memory.insufficient", "200 MiB are missing"), 507, "server_error"),
        (RefusedError("model.digest_mismatch", "model.bin is not what was signed"), 403, "server_error"),
        (UnavailableError("model.load_failed", "the engine gave up"), 503, "server_error"),
    ],
)
def test_what_loading_fails_with_reaches_the_client(start: Start, error: GarrisonError, status: int, kind: str) -> None:
    api = start(LocalOwner(make_route(), answer=lambda command: error))
    answered, body, _ = call(api, "POST", "/v1/chat/completions", chat("hello"))
    assert (answered, body["error"]["code"], body["error"]["type"]) == (status, error.code, kind)


def test_a_client_may_leave_while_its_model_loads(start: Start, worker: StandInWorker) -> None:
    owner = LocalOwner(make_route())
    api = start(owner)
    connection = connect(api)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat("hello")).encode())
    assert owner.asked.wait(DEADLINE_S)
    connection.close()
    owner.table = RouteTable((make_route(socket=worker.path),))
    status, _, _ = call(api, "POST", "/v1/chat/completions", chat("still here", stream=False))
    assert status == 200
    assert len(worker.seen.requests) == 1


def test_a_request_follows_a_switch_that_happens_under_it(start: Start, worker: StandInWorker, tmp_path: Path) -> None:
    owner = LocalOwner()
    tables = iter(RouteTable((make_route(socket=tmp_path / "stopped.sock"),)) for _ in range(2))
    now = RouteTable((make_route(socket=worker.path, version="2.0.0"),))
    api = start(owner, table=lambda: next(tables, now))
    status, _, _ = call(api, "POST", "/v1/chat/completions", chat("hello", stream=False))
    assert status == 200


def test_inference_does_not_need_the_owner_thread(start: Start, worker: StandInWorker) -> None:
    owner = LocalOwner(make_route(socket=worker.path))  # never answers a command
    api = start(owner)
    for _ in range(5):
        assert call(api, "POST", "/v1/chat/completions", chat("hello", stream=False))[0] == 200
    assert call(api, "GET", "/v1/models")[0] == 200
    assert owner.commands == []


# --- Open Inference Protocol -----------------------------------------------------------------------------------------


@pytest.fixture
def tensors(start: Start, worker: StandInWorker) -> LocalApi:
    route = make_route("classify", socket=worker.path, name="magika", version="3.3", engine=Engine.ONNXRUNTIME)
    idle = replace(route, alias="idle", model_id="other:1", socket=None, loaded=False)
    return start(LocalOwner(route, idle, make_route(socket=worker.path)))


def test_tensors_reach_the_worker_by_any_name(tensors: LocalApi, worker: StandInWorker) -> None:
    request = {"inputs": [{"name": "bytes", "datatype": "INT32", "shape": [1, 2], "data": [1, 2]}]}
    for path in ("classify", "magika", "magika:3.3", "classify/versions/3.3"):
        status, body, _ = call(tensors, "POST", f"/v2/models/{path}/infer", request)
        assert (status, body["echo"]) == (200, request)
    assert {path for _, path, _ in worker.seen.requests} == {"/v2/models/magika/infer"}
    status, body, _ = call(tensors, "GET", "/v2/models/classify")
    assert (status, body["name"]) == (200, "magika")
    assert call(tensors, "HEAD", "/v2/models/classify")[:2] == (200, None)


def test_server_and_model_health(tensors: LocalApi) -> None:
    assert call(tensors, "GET", "/v2")[1]["name"] == "garrison-agent"
    assert call(tensors, "GET", "/v2/health/live")[:2] == (200, {"live": True})
    assert call(tensors, "GET", "/v2/health/ready")[:2] == (200, {"ready": True})
    assert call(tensors, "GET", "/v2/models/classify/ready")[:2] == (200, {"name": "classify", "ready": True})
    assert call(tensors, "GET", "/v2/models/idle/ready")[0] == 503


def test_tensor_errors_are_one_string(tensors: LocalApi) -> None:
    for path, status in (("gone/infer", 404), ("classify/versions/9/infer", 404), ("chat/infer", 400)):
        answered, body, _ = call(tensors, "POST", f"/v2/models/{path}", {})
        assert answered == status
        assert list(body) == ["error"]
        assert isinstance(body["error"], str)


# --- who may call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example:5273"}, "api.host_refused"),
        ({"Host": "localhost.evil.example"}, "api.host_refused"),
        ({"Host": "10.0.0.7"}, "api.host_refused"),
        ({"Origin": "https://evil.example"}, "api.origin_refused"),
        ({"Origin": "null"}, "api.origin_refused"),
    ],
)
def test_foreign_pages_are_refused_on_tcp(
    api: LocalApi, worker: StandInWorker, headers: dict[str, str], code: str
) -> None:
    status, body, _ = call(api, "POST", "/v1/chat/completions", chat("hello"), headers)
    assert (status, body["error"]["code"], body["error"]["type"]) == (403, code, "permission_error")
    assert worker.seen.requests == []


def test_local_pages_and_names_are_welcome(api: LocalApi) -> None:
    for headers in ({"Host": "localhost:9"}, {"Host": "[::1]:9"}, {"Origin": "http://localhost:3000"}):
        assert call(api, "GET", "/v1/models", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/garrison/v1/models/chat/load"),
        ("POST", "/garrison/v1/models/chat/unload"),
        ("DELETE", "/garrison/v1/cache/smollm2"),
        ("POST", "/garrison/v1/cache-check"),
        ("DELETE", "/garrison/v1/cache-check/0123456789abcdef"),
        ("POST", "/garrison/v1/bundle"),
        ("POST", "/garrison/v1/bundle/0123456789abcdef"),
        ("POST", "/garrison/v1/export/-"),
        ("GET", "/models/load/chat"),
        ("GET", "/models/unload/chat"),
    ],
)
def test_management_is_refused_on_tcp(start: Start, method: str, path: str) -> None:
    owner = LocalOwner(make_route())
    status, body, _ = call(start(owner), method, path)
    assert (status, body["code"]) == (403, "api.management_needs_socket")
    assert "agent.sock" in body["hint"]
    assert owner.commands == []


# --- management and Foundry ------------------------------------------------------------------------------------------


def answer_everything(command: Command) -> object:
    manifest = make_manifest()
    view = model_view(
        manifest,
        manifest.variants[0],
        alias="chat",
        manifest_sha256=DIGEST,
        state="ACTIVE",
        serving=True,
        loaded=True,
    )
    match command:
        case GetStatus():
            return {"device": "edge-1"}
        case ListModels():
            return [{**view, "id": "smollm2:0.9", "serving": False}, view]
        case LoadModel("nobody"):
            return NotFoundError("model.unknown", "no model is called 'nobody'", hint="known here: chat")
        case LoadModel(name) | UnloadModel(name):
            outcome = "already_loaded" if isinstance(command, LoadModel) else "unloaded"
            return {"id": "smollm2:1.0.0", "alias": name, "outcome": outcome}
        case ListCache():
            return {"location": "/var/lib/garrison/blobs", "used_mb": 3, "free_mb": 9, "entries": []}
        case RemoveFromCache():
            return ConflictError("cache.in_use", "smollm2:1.0.0 serves", hint="roll out another version first")
        case Doctor():
            return [{"name": "broker", "outcome": "ok", "detail": "connected", "fix": ""}]
        case BeginImport():
            return ConflictError("bundle.busy", "another bundle is being imported", hint="wait", retryable=True)
        case GetExport(cursor):
            return {"device": "edge-1", "files": [], "next": cursor or None}
        case _:
            raise AssertionError(command)


def test_management_over_the_socket(start: Start, tmp_path: Path) -> None:
    start(LocalOwner(make_route(), answer=answer_everything), tcp_open=False)
    agent = AgentClient(tmp_path / "agent.sock")
    assert agent.get("status") == {"device": "edge-1"}
    assert len(agent.get("models")) == 2
    assert agent.get("models", "smollm2")["id"] == "smollm2:1.0.0"  # the one in service, not the first
    assert agent.get("models", "smollm2:0.9")["serving"] is False
    assert agent.post("models", "chat", "load")["outcome"] == "already_loaded"
    assert agent.post("models", "chat", "unload")["outcome"] == "unloaded"
    assert agent.get("cache")["used_mb"] == 3
    assert agent.get("doctor")[0]["name"] == "broker"
    assert agent.post("export", "-")["next"] is None
    assert agent.post("export", "audit:7")["next"] == "audit:7"
    with pytest.raises(ConflictError, match=r"bundle\.busy"):
        agent.post("bundle")
    with pytest.raises(NotFoundError, match=r"bundle\.session_unknown"):
        agent.post("bundle", "0123456789abcdef")
    with pytest.raises(ConflictError) as in_use:
        agent.delete("cache", "smollm2:1.0.0")
    assert in_use.value.code == "cache.in_use"
    assert in_use.value.hint == "roll out another version first"
    with pytest.raises(NotFoundError) as unknown:
        agent.get("models", "nobody")
    assert "chat" in unknown.value.hint
    with pytest.raises(NotFoundError, match=r"model\.unknown"):
        agent.post("models", "nobody", "load")


@pytest.mark.parametrize("keep_alive_s", ["600", True, float("nan"), float("inf")])
def test_a_keep_alive_is_a_number(start: Start, tmp_path: Path, keep_alive_s: object) -> None:
    start(LocalOwner(make_route(), answer=answer_everything), tcp_open=False)
    with pytest.raises(GarrisonError, match=r"api\.bad_json"):
        AgentClient(tmp_path / "agent.sock").post("models", "chat", "load", body={"keep_alive_s": keep_alive_s})


def test_a_keep_alive_may_be_larger_than_any_float(start: Start, tmp_path: Path) -> None:
    owner = LocalOwner(make_route(), answer=answer_everything)
    start(owner, tcp_open=False)
    AgentClient(tmp_path / "agent.sock").post("models", "chat", "load", body={"keep_alive_s": 10**400})
    assert owner.commands == [LoadModel("chat", 10**400)]


def test_foundry_local_paths(start: Start, worker: StandInWorker, tmp_path: Path) -> None:
    api = start(LocalOwner(make_route(socket=worker.path), answer=answer_everything))
    status = call(api, "GET", "/status")[1]
    assert status == {"modelCachePath": "/var/lib/garrison/blobs", "endpoints": api.endpoints, "pid": os.getpid()}
    assert call(api, "GET", "/models/loaded")[1] == ["smollm2:1.0.0"]
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(DEADLINE_S)
        raw.connect(str(tmp_path / "agent.sock"))
        raw.sendall(b"GET /models/load/chat HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        with raw.makefile("rb") as answer:
            assert answer.read().endswith(b'{"status":"already_loaded"}')


# --- doors -----------------------------------------------------------------------------------------------------------


def test_the_socket_is_private_and_goes_away(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    api = start(LocalOwner(), tcp_open=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert api.endpoints == []
    api.stop()
    assert not path.exists()
    api.stop()


def test_a_stale_socket_is_replaced_but_a_living_one_is_not(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    api = start(LocalOwner(answer=answer_everything))
    with pytest.raises(UnavailableError) as used:
        start(LocalOwner())
    assert used.value.code == "api.socket_in_use"
    assert AgentClient(path).get("status") == {"device": "edge-1"}
    with pytest.raises(UnavailableError) as port:
        start(LocalOwner(), port=urlsplit(api.endpoints[0]).port, socket=tmp_path / "other.sock")
    assert port.value.code == "api.port_in_use"


def test_stop_cuts_endless_streams_short_and_says_so(
    start: Start, worker: StandInWorker, caplog: pytest.LogCaptureFixture
) -> None:
    owner = LocalOwner(make_route(socket=worker.path), make_route("idle", name="other"))
    api = start(owner)
    streaming, response = open_stream(api, "step")
    worker.seen.release.release()
    response.readline()
    loading = connect(api)
    loading.request("POST", "/v1/chat/completions", json.dumps(chat("hello", model="idle")).encode())
    assert owner.asked.wait(DEADLINE_S)
    api.stop()
    assert worker.seen.client_gone.wait(DEADLINE_S)
    assert b'"agent.stopping"' in response.read()
    refused = loading.getresponse()
    assert refused.status == 503
    assert b'"agent.stopping"' in refused.read()
    assert "Traceback" not in caplog.text
    response.close()
    streaming.close()
    loading.close()
