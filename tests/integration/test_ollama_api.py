"""Ollama's surface of the local API, in front of a stand-in worker: the official ``ollama`` client asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import ollama
import pytest

from garrison_agent.api.commands import Command, ListLoaded, LoadedView, LoadModel, SetKeepAlive
from garrison_agent.api.ollama import MAX_KEEP_ALIVE_S
from garrison_agent.api.routes import RouteTable
from garrison_agent.api.server import LocalApi
from garrison_agent.core.applications import Application, ApplicationTable, key_digest
from garrison_protocol.states import Engine
from tests.fakes.local_owner import DIGEST, LocalOwner, make_route
from tests.fakes.worker_server import StandInWorker
from tests.integration.surfaces import call, serving

pytestmark = pytest.mark.integration

QUESTION = [{"role": "user", "content": "stay at home"}]
LOADED = LoadedView(
    alias="chat",
    id="smollm2:1.0.0",
    size_bytes=200_000_000,
    loaded_since=1_700_000_000,
    expires_at=1_800_000_000,
    pinned=False,
    active=0,
)


def answer(command: Command) -> object:
    match command:
        case ListLoaded():
            return [LOADED]
        case LoadModel(name):
            return {"id": "smollm2:1.0.0", "alias": name, "outcome": "loaded"}
    return "done"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StandInWorker]:
    with StandInWorker(tmp_path / "1.sock") as running:
        yield running


@pytest.fixture
def owner(worker: StandInWorker) -> LocalOwner:
    tensors = make_route("classify", socket=worker.path, name="magika", version="3.3", engine=Engine.ONNXRUNTIME)
    return LocalOwner(make_route(socket=worker.path), tensors, answer=answer)


@pytest.fixture
def api(owner: LocalOwner, tmp_path: Path) -> Iterator[LocalApi]:
    with serving(owner, tmp_path / "agent.sock") as running:
        yield running


@pytest.fixture
def client(api: LocalApi) -> Iterator[ollama.Client]:
    with ollama.Client(api.endpoints[0]) as running:
        yield running


def test_it_says_what_it_is(api: LocalApi) -> None:
    status, text = call(api, "GET", "/")
    assert status == 200
    assert text.startswith(b"garrison-agent is running")
    assert call(api, "HEAD", "/") == (200, b"")
    version = call(api, "GET", "/api/version")[1]
    assert tuple(map(int, version["version"].split("."))) >= (0, 6, 4)  # what well-known clients insist on


def test_models_are_listed_as_ollamas(client: ollama.Client) -> None:
    (model,) = client.list().models  # tensor models are not Ollama's business
    assert model.model == "chat:latest"
    assert model.digest == DIGEST
    assert model.size == 3 * 1024 * 1024
    assert model.modified_at == datetime.fromisoformat("2025-01-01T00:00:00+00:00")
    assert model.details is not None
    assert (model.details.format, model.details.parameter_size) == ("gguf", "134.52M")
    assert model.details.quantization_level == "Q4_1"


def test_a_model_is_shown(client: ollama.Client) -> None:
    shown = client.show("smollm2:1.0.0")
    assert shown.license == "Apache-2.0\n\nUse it, keep the notice."
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.parameter_count"] == 134_515_008
    assert shown.modelinfo[f"{shown.modelinfo['general.architecture']}.context_length"] == 2048


def test_what_is_in_memory_and_until_when(client: ollama.Client, owner: LocalOwner) -> None:
    (running,) = client.ps().models
    assert (running.model, running.digest) == ("chat:latest", DIGEST)
    assert (running.size, running.size_vram) == (200_000_000, 0)
    assert running.expires_at is not None
    assert running.expires_at.timestamp() == 1_800_000_000
    owner.answer = lambda command: [{**LOADED, "expires_at": None}]
    (pinned,) = client.ps().models
    assert pinned.expires_at is not None
    assert pinned.expires_at.year == 9999


@pytest.mark.parametrize("name", ["chat", "chat:latest", "smollm2", "smollm2:latest", "smollm2:1.0.0"])
def test_every_name_reaches_the_worker_with_the_very_bytes(
    client: ollama.Client, worker: StandInWorker, name: str
) -> None:
    assert client.chat(name, QUESTION).message.content == "stay at home"
    ((method, path, body),) = worker.seen.requests
    assert (method, path) == ("POST", "/api/chat")
    assert json.loads(body)["model"] == name


def test_lines_reach_the_client_one_by_one(client: ollama.Client) -> None:
    parts = list(client.chat("chat", QUESTION, stream=True))
    assert [part.message.content for part in parts] == ["stay", "at", "home", ""]
    assert [part.done for part in parts] == [False, False, False, True]
    assert [part.response for part in client.generate("chat", "one two", stream=True)] == ["one", "two", ""]


def test_a_worker_that_dies_in_mid_stream_ends_in_a_line_that_says_so(client: ollama.Client, api: LocalApi) -> None:
    _, text = call(api, "POST", "/api/chat", {"model": "chat", "messages": [{"role": "user", "content": "die"}]})
    half, error = [json.loads(line) for line in text.splitlines()]  # the half line was dropped
    assert half["message"]["content"] == "half"
    assert error.keys() == {"error"}
    with pytest.raises(ollama.ResponseError, match="worker ended"):
        list(client.chat("chat", [{"role": "user", "content": "die"}], stream=True))


def test_errors_are_ollamas(client: ollama.Client, api: LocalApi) -> None:
    with pytest.raises(ollama.ResponseError) as unknown:
        client.chat("llama3", QUESTION)
    assert (unknown.value.error, unknown.value.status_code) == ("model 'llama3' not found", 404)
    with pytest.raises(ollama.ResponseError) as refused:
        client.chat("chat", [{"role": "user", "content": "reject"}])
    assert (refused.value.error, refused.value.status_code) == ("too long", 400)
    with pytest.raises(ollama.ResponseError, match="tensors"):
        client.chat("classify", QUESTION)
    with pytest.raises(ollama.ResponseError, match="keep_alive"):
        client.chat("chat", QUESTION, keep_alive="soon")
    assert call(api, "POST", "/api/chat", {}) == (
        400,
        {"error": "model is required (GET /api/tags lists the models here)"},
    )
    assert call(api, "GET", "/api/chat")[0] == 405
    assert call(api, "GET", "/api/nothing")[0] == 404


def test_nothing_is_pulled_or_changed(client: ollama.Client, api: LocalApi, owner: LocalOwner) -> None:
    for attempt in (
        lambda: client.pull("llama3"),
        lambda: list(client.pull("llama3", stream=True)),
        lambda: client.push("chat"),
        lambda: client.create("mine", from_="chat"),
        lambda: client.copy("chat", "mine"),
        lambda: client.delete("chat"),
    ):
        with pytest.raises(ollama.ResponseError, match="models come from the fleet") as refused:
            attempt()
        assert refused.value.status_code == 403
    assert owner.commands == []


def test_pulling_what_is_here_succeeds_and_says_so(client: ollama.Client, api: LocalApi) -> None:
    assert client.pull("chat").status == "success"
    steps = [step.status or "" for step in client.pull("smollm2:1.0.0", stream=True)]
    assert steps[0].startswith("smollm2:1.0.0 is here already")
    assert steps[-1] == "success"


def test_a_request_says_how_long_its_model_stays(client: ollama.Client, owner: LocalOwner) -> None:
    client.chat("chat", QUESTION, keep_alive="1h30m")
    client.generate("chat", "hello", keep_alive=-1)
    assert owner.commands == [SetKeepAlive("chat", 5400.0), SetKeepAlive("chat", MAX_KEEP_ALIVE_S)]


def test_only_who_manages_the_board_lets_a_model_stay_for_ever(
    api: LocalApi, client: ollama.Client, owner: LocalOwner, tmp_path: Path
) -> None:
    for_ever = {"model": "chat", "keep_alive": "2400000h", "stream": False}
    assert call(tmp_path / "agent.sock", "POST", "/api/generate", for_ever)[0] == 200
    client.generate("chat", keep_alive=-1)
    assert owner.commands == [LoadModel("chat", seconds, waits=True) for seconds in (-1.0, MAX_KEEP_ALIVE_S)]


def test_who_has_used_up_his_share_has_no_say_in_what_stays(owner: LocalOwner, tmp_path: Path) -> None:
    application = Application("camera", key_digest("gsk_1"), 0, requests_per_min=1)
    table = ApplicationTable((application,))
    with (
        serving(owner, tmp_path / "two.sock", applications=lambda: table) as api,
        ollama.Client(api.endpoints[0], headers={"authorization": "Bearer gsk_1"}) as camera,
    ):
        assert camera.generate("chat", "stay at home").response
        for keep_alive, prompt in (("10m", "stay at home"), (0, "stay at home"), ("10m", None), (0, None)):
            with pytest.raises(ollama.ResponseError) as refused:
                camera.generate("chat", prompt, keep_alive=keep_alive)
            assert refused.value.status_code == 429
    assert owner.commands == []


def test_a_model_that_failed_for_good_is_not_started_by_whoever_comes(owner: LocalOwner, client: ollama.Client) -> None:
    owner.table = RouteTable((replace(make_route(), failure="its worker was ended by the kernel"),))
    with pytest.raises(ollama.ResponseError, match="failed again and again"):
        client.generate("chat")
    assert owner.commands == []


def test_keep_alive_zero_acts_after_the_answer(client: ollama.Client, owner: LocalOwner, worker: StandInWorker) -> None:
    seen: list[int] = []

    def note(command: Command) -> object:
        seen.append(len(worker.seen.requests))
        return "done"

    owner.answer = note
    assert client.chat("chat", QUESTION, keep_alive=0).message.content == "stay at home"
    assert owner.asked.wait(20)
    assert (owner.commands, seen) == ([SetKeepAlive("chat", 0.0)], [1])


def test_without_a_prompt_a_model_is_loaded_or_unloaded(
    client: ollama.Client, owner: LocalOwner, worker: StandInWorker
) -> None:
    loaded = client.chat("chat", [], keep_alive="10m")
    assert (loaded.done, loaded.done_reason, loaded.message.content) == (True, "load", "")
    assert client.generate("chat").done_reason == "load"
    assert client.generate("chat", keep_alive=0).done_reason == "unload"
    owner.table = RouteTable((make_route(),))
    assert client.generate("chat", keep_alive=0).done_reason == "unload"  # it is not in memory: nothing to do
    loads = [LoadModel("chat", 600.0, waits=True), LoadModel("chat", waits=True)]
    assert owner.commands == [*loads, SetKeepAlive("chat", 0.0)]
    assert worker.seen.requests == []


def test_a_request_to_a_model_on_disk_loads_it(client: ollama.Client, owner: LocalOwner, worker: StandInWorker) -> None:
    owner.table = RouteTable((make_route(),))

    def load(command: Command) -> object:
        owner.table = RouteTable((make_route(socket=worker.path),))
        return answer(command)

    owner.answer = load
    assert client.chat("chat:latest", QUESTION).message.content == "stay at home"
    assert owner.commands == [LoadModel("chat", waits=True)]
    assert worker.seen.headers[0]["x-garrison-load-ms"].isdecimal()  # for load_duration
