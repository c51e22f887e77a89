"""Upstreams through the local API: a stand-in that does whatever a test wants, and llama-cpp-python's own server."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from openai import APIError, APIStatusError, BadRequestError, OpenAI

from garrison_agent.api.commands import RecordRequest
from garrison_agent.api.server import LocalApi
from garrison_agent.api.upstreams import Upstreams
from garrison_agent.config import UpstreamConfig
from garrison_agent.core.applications import Application, ApplicationTable
from garrison_agent.core.health import CLIENT_GONE
from garrison_agent.runtimes.status import RequestRecord
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.pki import Authority
from tests.fakes.upstream_server import Call, UpstreamStandIn
from tests.fakes.worker_server import StandInWorker
from tests.integration.runtimes.workers import eventually, smollm2

pytestmark = pytest.mark.integration

DEADLINE_S = 20.0
Start = Callable[..., LocalApi]


@pytest.fixture
def upstream() -> Iterator[UpstreamStandIn]:
    with UpstreamStandIn() as server:
        yield server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[LocalApi] = []

    def begin(*configs: UpstreamConfig, owner: LocalOwner | None = None, **changes: Any) -> LocalApi:
        local = owner or LocalOwner(answer=lambda command: [])
        api = LocalApi(
            host="127.0.0.1",
            port=0,
            tcp_open=True,
            socket=tmp_path / "agent.sock",
            table=local.read,
            command=local.post,
            upstreams=Upstreams(configs),
            **changes,
        )
        api.start()
        running.append(api)
        return api

    yield begin
    for api in running:
        api.stop()


def config(server: UpstreamStandIn | str, **changes: Any) -> UpstreamConfig:
    url = server if isinstance(server, str) else server.url
    return UpstreamConfig.model_validate({"alias": "big", "url": url, "model": "theirs", **changes})


_CLIENTS: list[OpenAI] = []


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while _CLIENTS:
        _CLIENTS.pop().close()


def client(api: LocalApi, key: str = "none") -> OpenAI:
    _CLIENTS.append(OpenAI(base_url=f"{api.endpoints[0]}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S))
    return _CLIENTS[-1]


def ask(api: LocalApi, content: str = "hello there", **more: Any) -> Any:
    return client(api).chat.completions.create(model="big", messages=[{"role": "user", "content": content}], **more)


def call(api: LocalApi, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    address = urlsplit(api.endpoints[0])
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=DEADLINE_S)
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "big", "messages": [{"role": "user", "content": "hello"}], **more}


# --- what works ------------------------------------------------------------------------------------------------------


def test_a_request_reaches_it_under_its_own_name_for_the_model(start: Start, upstream: UpstreamStandIn) -> None:
    answer = ask(start(config(upstream)), temperature=0.5)
    assert answer.choices[0].message.content == "hello there"
    (sent,) = upstream.calls
    assert (sent.method, sent.path) == ("POST", "/v1/chat/completions")
    assert upstream.last == {**chat(messages=upstream.last["messages"], temperature=0.5), "model": "theirs"}


def test_streams_pass_through(start: Start, upstream: UpstreamStandIn) -> None:
    words = [part.choices[0].delta.content for part in ask(start(config(upstream)), "one two three", stream=True)]
    assert words == ["one", "two", "three"]


def test_the_callers_key_stays_here_and_the_boards_own_is_sent(
    start: Start, upstream: UpstreamStandIn, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-first\n")
    api = start(config(upstream, api_key_file=key))
    call(api, "POST", "/v1/chat/completions", chat(), Authorization="Bearer callers-own", Cookie="a=b", X_Mine="1")
    assert upstream.calls[-1].headers["authorization"] == "Bearer sk-first"
    assert {"cookie", "x_mine"}.isdisjoint(upstream.calls[-1].headers)
    key.write_text("sk-second")
    call(api, "POST", "/v1/chat/completions", chat())
    assert upstream.calls[-1].headers["authorization"] == "Bearer sk-second"


def test_without_a_key_none_is_sent(start: Start, upstream: UpstreamStandIn) -> None:
    call(start(config(upstream)), "POST", "/v1/chat/completions", chat(), Authorization="Bearer callers-own")
    assert "authorization" not in upstream.calls[-1].headers


def test_tls_holds_to_the_ca_that_the_configuration_names(start: Start, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ca", "ca"), Authority(tmp_path / "other", "other")
    issued = authority.issue("server", server=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.cert, issued.key)
    with UpstreamStandIn(tls=context) as server:
        api = start(config(server, ca_file=authority.pem), config(server, ca_file=other.pem, alias="foreign"))
        assert ask(api).choices[0].message.content == "hello there"
        status, answer, _ = call(api, "POST", "/v1/chat/completions", chat(model="foreign"))
        assert (status, answer["error"]["code"]) == (502, "upstream.unreachable")
        assert len(server.calls) == 1


# --- how it is shown -------------------------------------------------------------------------------------------------


def test_it_is_listed_as_what_it_is(start: Start, upstream: UpstreamStandIn) -> None:
    api = start(config(upstream), owner=LocalOwner(make_route()))
    listed = call(api, "GET", "/v1/models")[1]["data"]
    assert [(one["id"], one["owned_by"]) for one in listed] == [("chat", "HuggingFaceTB"), ("big", "upstream")]
    assert call(api, "GET", "/v1/models/big")[1]["root"] == "theirs"


def state_of(start: Start, server: UpstreamStandIn | str, **changes: Any) -> str:
    api = start(config(server, **changes), owner=LocalOwner(answer=lambda command: {"device": "edge-1"}))
    (view,) = call(api, "GET", "/garrison/v1/status")[1]["upstreams"]
    api.stop()
    assert view["alias"] == "big"
    return str(view["state"])


def test_status_looks_whether_it_answers(start: Start, upstream: UpstreamStandIn, tmp_path: Path) -> None:
    assert state_of(start, upstream) == "ok"
    assert state_of(start, upstream, model="other") == "model_unknown"
    assert state_of(start, upstream, api_key_file=tmp_path / "none") == "key_unreadable"
    for act, state in (
        (lambda call: call.answer({}, 401), "key_refused"),
        (lambda call: call.answer({}, 404), "bad_answer"),
        (lambda call: call.answer(b"[" * 100_000), "bad_answer"),
        (lambda call: call.answer(b"", 301, location="http://127.0.0.1:9/"), "bad_answer"),
        (lambda call: call.send(b"220 mail\r\n"), "bad_answer"),
        (lambda call: None, "broke_off"),
    ):
        upstream.act = act
        assert state_of(start, upstream) == state
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert state_of(start, f"http://127.0.0.1:{closed.getsockname()[1]}/v1") == "unreachable"


def test_the_model_list_shows_it_as_not_verified(start: Start, upstream: UpstreamStandIn) -> None:
    (view,) = call(start(config(upstream)), "GET", "/garrison/v1/models")[1]
    assert (view["alias"], view["state"], view["loaded"]) == ("big", "NOT VERIFIED", True)
    assert "not verified" in view["publisher"]


def test_a_signed_model_of_its_name_comes_first(start: Start, upstream: UpstreamStandIn, tmp_path: Path) -> None:
    with StandInWorker(tmp_path / "w.sock") as worker:
        owner = LocalOwner(answer=lambda command: {"device": "edge-1"})
        api = start(config(upstream), owner=owner)
        assert ask(api).model == "theirs"
        owner.table = LocalOwner(make_route("big", socket=worker.path)).table
        assert ask(api).model == "m"
        assert len(upstream.calls) == 1
        assert [one["owned_by"] for one in call(api, "GET", "/v1/models")[1]["data"]] == ["HuggingFaceTB"]
        assert call(api, "GET", "/garrison/v1/status")[1]["upstreams"][0]["state"] == "shadowed"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/models/big/infer", {"inputs": []}),
        ("/api/chat", chat()),
        ("/api/generate", {"model": "big", "prompt": "hello"}),
    ],
)
def test_other_surfaces_refuse_it_and_say_why(
    start: Start, upstream: UpstreamStandIn, path: str, body: dict[str, Any]
) -> None:
    status, answer, _ = call(start(config(upstream)), "POST", path, body)
    assert status == 400
    assert "upstream" in answer["error"]
    assert upstream.calls == []


# --- whose it is -----------------------------------------------------------------------------------------------------


def test_applications_use_it_only_if_it_is_one_of_their_models(start: Start, upstream: UpstreamStandIn) -> None:
    keys = {name: f"gsk_{digit * 64}" for name, digit in (("one", "1"), ("two", "2"))}
    table = ApplicationTable(
        tuple(
            Application(name, hashlib.sha256(keys[name].encode()).hexdigest(), 1, models=models, requests_per_min=2)
            for name, models in (("one", frozenset({"big"})), ("two", frozenset({"chat"})))
        )
    )
    api = start(config(upstream), applications=lambda: table, tcp_keys=True)
    messages: Any = [{"role": "user", "content": "hello"}]
    one, two = (client(api, key) for key in keys.values())
    for _ in range(2):
        assert one.chat.completions.create(model="big", messages=messages).choices[0].message.content == "hello"
    with pytest.raises(APIStatusError) as limited:
        one.chat.completions.create(model="big", messages=messages)
    assert (limited.value.status_code, limited.value.code) == (429, "rate_limit_exceeded")
    with pytest.raises(APIStatusError) as denied:
        two.chat.completions.create(model="big", messages=messages)
    assert (denied.value.status_code, denied.value.code) == (403, "api.model_not_permitted")
    assert ([model.id for model in one.models.list()], [model.id for model in two.models.list()]) == (["big"], [])
    assert len(upstream.calls) == 2


# --- what is recorded ------------------------------------------------------------------------------------------------


def record_of(owner: LocalOwner) -> RequestRecord:
    """Return what the owner hears of the only request."""

    def told() -> list[RecordRequest]:
        return [command for command in owner.commands if isinstance(command, RecordRequest)]

    eventually(lambda: len(told()) == 1, "the request is recorded")
    (done,) = told()
    assert (done.alias, done.model) == ("big", "big:upstream")
    return done.record


def test_an_answer_is_recorded_with_the_tokens_that_it_tells(start: Start, upstream: UpstreamStandIn) -> None:
    owner = LocalOwner()
    ask(start(config(upstream), owner=owner), "one two three")
    record = record_of(owner)
    assert (record.kind, record.ok, record.status, record.app) == ("chat", True, 200, "local")
    assert (record.prompt_tokens, record.completion_tokens) == (7, 3)
    assert record.ttft_ms is None


@pytest.mark.parametrize("wanted", [False, True])
def test_a_stream_is_asked_for_its_tokens_and_the_client_sees_them_if_it_asked(
    start: Start, upstream: UpstreamStandIn, wanted: bool
) -> None:
    owner = LocalOwner()
    options: Any = {"stream_options": {"include_usage": True}} if wanted else {}
    parts = list(ask(start(config(upstream), owner=owner), "one two three", stream=True, **options))
    assert [part.usage is not None for part in parts] == [False] * 3 + [True] * wanted
    record = record_of(owner)
    assert (record.ok, record.prompt_tokens, record.completion_tokens) == (True, 7, 3)
    assert record.ttft_ms is not None


def test_where_a_server_may_not_be_asked_the_pieces_are_counted(start: Start, upstream: UpstreamStandIn) -> None:
    owner = LocalOwner()
    list(ask(start(config(upstream, stream_usage=False), owner=owner), "one two three four", stream=True))
    assert "stream_options" not in upstream.last
    record = record_of(owner)
    assert (record.ok, record.prompt_tokens, record.completion_tokens) == (True, 0, 4)


def test_responses_and_embeddings_are_counted_in_their_own_words(start: Start, upstream: UpstreamStandIn) -> None:
    def respond(call: Call) -> None:
        call.begin_events()
        for value in (
            {"type": "response.output_text.delta", "delta": "a"},
            {"type": "response.completed", "response": {"usage": {"input_tokens": 4, "output_tokens": 2}}},
        ):
            call.chunk(b"data: " + json.dumps(value).encode() + b"\r\n\r\n")
        call.send(b"0\r\n\r\n")

    upstream.act, owner = respond, LocalOwner()
    api = start(config(upstream), owner=owner)
    address = urlsplit(api.endpoints[0])
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=DEADLINE_S)
    connection.request("POST", "/v1/responses", json.dumps({"model": "big", "input": "a", "stream": True}).encode())
    assert connection.getresponse().read().count(b"data: ") == 2
    connection.close()
    assert "stream_options" not in upstream.last
    record = record_of(owner)
    assert (record.kind, record.prompt_tokens, record.completion_tokens) == ("chat", 4, 2)
    owner.commands.clear()
    upstream.act = lambda call: call.answer({"data": [{"embedding": [0.5] * 50_000}], "usage": {"prompt_tokens": 9}})
    assert call(api, "POST", "/v1/embeddings", {"model": "big", "input": "a"})[0] == 200
    record = record_of(owner)
    assert (record.kind, record.prompt_tokens, record.completion_tokens) == ("embedding", 9, 0)


def refuse(call: Call) -> None:
    call.answer({"error": {"message": "too long"}}, 400)


def half_an_answer(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n")


def end_early(call: Call) -> None:
    call.begin_events()
    call.event("half")


@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        (refuse, 400, "upstream.refused"),
        (lambda call: call.answer({}, 500), 502, "upstream.failed"),
        (end_early, 502, "upstream.broke_off"),
        (half_an_answer, 502, "upstream.broke_off"),
    ],
)
def test_what_is_not_answered_is_recorded_with_why(
    start: Start, upstream: UpstreamStandIn, act: Callable[[Call], None], status: int, code: str
) -> None:
    upstream.act, owner = act, LocalOwner()
    with pytest.raises((APIError, httpx2.RemoteProtocolError)):
        list(ask(start(config(upstream), owner=owner), stream=True))
    record = record_of(owner)
    assert (record.ok, record.status, record.error_code) == (False, status, code)


def test_a_client_that_leaves_is_recorded_as_gone(start: Start, upstream: UpstreamStandIn) -> None:
    def go_on(call: Call) -> None:
        call.begin_events()
        call.event("one")
        call.wait_for_end()

    upstream.act, owner = go_on, LocalOwner()
    stream = ask(start(config(upstream), owner=owner), stream=True)
    next(iter(stream))
    stream.close()
    record = record_of(owner)
    assert (record.ok, record.status, record.error_code) == (False, 499, CLIENT_GONE)
    assert record.completion_tokens == 1


def test_a_request_that_the_agents_end_cuts_short_is_recorded_once(start: Start, upstream: UpstreamStandIn) -> None:
    upstream.act, owner = Call.wait_for_end, LocalOwner()
    api = start(config(upstream), owner=owner)
    with ThreadPoolExecutor() as clients:
        answer = clients.submit(call, api, "POST", "/v1/chat/completions", chat())
        eventually(lambda: len(upstream.calls) == 1, "the upstream was asked")
        api.stop()
        assert answer.result()[0] == 503
    record = record_of(owner)
    assert (record.ok, record.status, record.error_code) == (False, 503, "agent.stopping")


def test_events_come_at_once_whatever_ends_their_lines(start: Start, upstream: UpstreamStandIn) -> None:
    def crlf(call: Call) -> None:
        call.begin_events()
        call.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\r\n\r\n')
        call.wait_for_end()

    upstream.act = crlf
    stream = ask(start(config(upstream)), stream=True)
    assert next(iter(stream)).choices[0].delta.content == "one"
    stream.close()


# --- what goes wrong -------------------------------------------------------------------------------------------------


def endless_headers(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\n")
    try:
        while True:
            call.send(b"x: " + b"y" * 1000 + b"\r\n")
    except OSError:
        call.server.client_gone.set()


FAULTS: dict[str, tuple[Callable[[Call], None], str]] = {
    "no HTTP": (lambda call: call.send(b"220 mail\r\n\r\n"), "upstream.bad_answer"),
    "nothing": (lambda call: None, "upstream.broke_off"),
    "half a head": (lambda call: call.send(b"HTTP/1.1 200 OK\r\ncontent"), "upstream.broke_off"),
    "half an answer": (half_an_answer, "upstream.broke_off"),
    "endless headers": (endless_headers, "upstream.bad_answer"),
    "redirect": (lambda call: call.answer({}, 307, location="http://127.0.0.1:9/"), "upstream.bad_answer"),
    "continue": (lambda call: call.send(b"HTTP/1.1 100 Continue\r\n\r\n"), "upstream.bad_answer"),
    "compressed": (lambda call: call.answer(b"\x1f\x8b", content_encoding="gzip"), "upstream.bad_answer"),
    "no length": (lambda call: call.send(b"HTTP/1.1 200 OK\r\n\r\n{}"), "upstream.bad_answer"),
    "its key": (lambda call: call.answer({"error": {"message": "no"}}, 401), "upstream.key_refused"),
    "forbidden": (lambda call: call.answer({}, 403), "upstream.key_refused"),
    "bug": (lambda call: call.answer(b"Traceback: hello there", 500), "upstream.failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_its_faults_are_errors_in_openais_shape(start: Start, upstream: UpstreamStandIn, fault: str) -> None:
    upstream.act, code = FAULTS[fault]
    with pytest.raises(APIStatusError) as caught:
        ask(start(config(upstream)))
    error: Any = caught.value.body
    assert (caught.value.status_code, error["code"], error["type"]) == (502, code, "server_error")
    assert "big" in error["message"]
    assert "hello there" not in json.dumps(error)
    if fault == "endless headers":
        assert upstream.client_gone.wait(DEADLINE_S)


def test_one_that_is_not_there_is_said_to_be_so(start: Start) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        api = start(config(f"http://127.0.0.1:{closed.getsockname()[1]}/v1"))
        status, answer, _ = call(api, "POST", "/v1/chat/completions", chat())
    assert (status, answer["error"]["code"]) == (502, "upstream.unreachable")
    assert "[[upstream]]" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            400,
            {"error": {"message": "too long", "type": "t", "param": "messages", "code": "context_length_exceeded"}},
            ("too long", "t", "messages", "context_length_exceeded"),
        ),
        (
            400,
            {"object": "error", "message": "too long", "type": "BadRequestError", "param": None, "code": 400},
            ("too long", "BadRequestError", None, "upstream.refused"),
        ),
        (404, {"detail": "Not Found"}, ("the upstream big answered 404", "not_found_error", None, "upstream.refused")),
        (422, b"<html>", ("the upstream big answered 422", "invalid_request_error", None, "upstream.refused")),
        (429, {"error": {"message": "slow down"}}, ("slow down", "rate_limit_error", None, "upstream.refused")),
        (503, {"error": {"message": "loading"}}, ("loading", "server_error", None, "upstream.refused")),
    ],
)
def test_its_refusals_pass_in_openais_shape(
    start: Start, upstream: UpstreamStandIn, status: int, body: Any, expected: tuple[str | None, ...]
) -> None:
    upstream.act = lambda call: call.answer(body, status, retry_after="7")
    got, answer, headers = call(start(config(upstream)), "POST", "/v1/chat/completions", chat())
    assert got == status
    assert tuple(answer["error"][key] for key in ("message", "type", "param", "code")) == expected
    assert headers["retry-after"] == "7"


def test_a_stream_that_breaks_off_ends_with_an_error_event(start: Start, upstream: UpstreamStandIn) -> None:
    def break_off(call: Call) -> None:
        call.begin_events()
        call.event("half")
        call.chunk(b'data: {"id": "c1", "choi')

    upstream.act = break_off
    api = start(config(upstream))
    with pytest.raises(APIError, match="broke off"):
        list(ask(api, stream=True))
    address = urlsplit(api.endpoints[0])
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=DEADLINE_S)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat(stream=True)).encode())
    events = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    assert "half" in events[0]
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "upstream.broke_off"
    assert events[2:] == [""]


def test_a_client_that_leaves_closes_the_upstream(start: Start, upstream: UpstreamStandIn) -> None:
    def go_on(call: Call) -> None:
        call.begin_events()
        call.event("one")
        call.wait_for_end()

    upstream.act = go_on
    stream = ask(start(config(upstream)), stream=True)
    assert next(iter(stream)).choices[0].delta.content == "one"
    stream.close()
    assert upstream.client_gone.wait(DEADLINE_S)


def test_a_client_that_leaves_before_the_answer_closes_it_too(start: Start, upstream: UpstreamStandIn) -> None:
    upstream.act = Call.wait_for_end
    api = start(config(upstream))
    address = urlsplit(api.endpoints[0])
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=DEADLINE_S)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat()).encode())
    eventually(lambda: len(upstream.calls) == 1, "the upstream was asked")
    connection.close()
    assert upstream.client_gone.wait(DEADLINE_S)


def test_the_clients_deadline_holds(start: Start, upstream: UpstreamStandIn) -> None:
    upstream.act = Call.wait_for_end
    timeout = {"x-garrison-timeout": "0.2"}
    status, answer, _ = call(start(config(upstream)), "POST", "/v1/chat/completions", chat(), **timeout)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert upstream.client_gone.wait(DEADLINE_S)


def test_one_that_keeps_silent_is_given_up(start: Start, upstream: UpstreamStandIn) -> None:
    def pause(call: Call) -> None:
        call.begin_events()
        call.event("one")
        call.wait_for_end()

    api = start(config(upstream, timeout_s=1), config(upstream, timeout_s=1, alias="streaming"))
    upstream.act = Call.wait_for_end
    status, answer, _ = call(api, "POST", "/v1/chat/completions", chat())
    assert (status, answer["error"]["code"]) == (502, "upstream.unreachable")
    upstream.act = pause
    with pytest.raises(APIError, match="broke off"):
        list(ask(api, stream=True))


def test_one_that_takes_no_request_is_given_up_too(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # the kernel accepts, and nobody reads
        api = start(config(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", timeout_s=1))
        body = chat(messages=[{"role": "user", "content": "x" * 12_000_000}])
        status, answer, _ = call(api, "POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (502, "upstream.unreachable")


# --- a real one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_server() -> Iterator[str]:
    """llama-cpp-python's own server with SmolLM2; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = ["--model", str(smollm2()), "--model_alias", "smol", "--n_ctx", "512", "--n_threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.llama_python_server", "--host", "127.0.0.1", "--port", str(port), *model],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    url = f"http://127.0.0.1:{port}/v1"

    def answers() -> bool:
        assert child.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        eventually(answers, "the server answers")
        yield url
    finally:
        child.kill()
        child.wait()


def test_llama_cpp_pythons_server_as_an_upstream(start: Start, real_server: str) -> None:
    owner = LocalOwner(answer=lambda command: {"device": "edge-1"})
    api = start(config(real_server, model="smol"), owner=owner)
    assert call(api, "GET", "/garrison/v1/status")[1]["upstreams"][0]["state"] == "ok"
    options: Any = {"max_tokens": 8, "temperature": 0}
    whole = ask(api, "Say hello.", **options).choices[0].message.content
    assert whole
    parts = [part.choices[0].delta.content or "" for part in ask(api, "Say hello.", stream=True, **options)]
    assert "".join(parts) == whole
    assert client(api).completions.create(model="big", prompt="One two", max_tokens=3).choices[0].text
    with pytest.raises((BadRequestError, APIStatusError)) as refused:
        ask(api, "hello " * 600, **options)
    assert refused.value.status_code in (400, 502)
