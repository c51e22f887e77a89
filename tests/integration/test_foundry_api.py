"""The older generation of Foundry Local's service, in front of a stand-in worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.api.commands import Command, ListCache, LoadModel, UnloadModel
from garrison_agent.api.server import LocalApi
from garrison_protocol.states import Engine
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.worker_server import StandInWorker
from tests.integration.surfaces import call, serving

pytestmark = pytest.mark.integration

COUNT = "/v1/chat/completions/tokenizer/encode/count"


def answer(command: Command) -> object:
    match command:
        case ListCache():
            return {"location": "/var/lib/garrison/blobs", "used_mb": 3, "free_mb": 9, "entries": []}
        case LoadModel() | UnloadModel():
            return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "loaded"}
    raise AssertionError(command)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StandInWorker]:
    with StandInWorker(tmp_path / "1.sock") as running:
        yield running


@pytest.fixture
def owner(worker: StandInWorker) -> LocalOwner:
    tensors = make_route("classify", name="magika", version="3.3", engine=Engine.ONNXRUNTIME)
    return LocalOwner(make_route(socket=worker.path), tensors, answer=answer)


@pytest.fixture
def api(owner: LocalOwner, tmp_path: Path) -> Iterator[LocalApi]:
    with serving(owner, tmp_path / "agent.sock") as running:
        yield running


@pytest.fixture
def socket(api: LocalApi, tmp_path: Path) -> Path:
    """Where managers ask."""
    return tmp_path / "agent.sock"


def test_the_catalog_has_foundrys_fields(api: LocalApi) -> None:
    status, entries = call(api, "GET", "/foundry/list")
    assert status == 200
    chat, classify = entries
    assert chat == {
        "id": "smollm2:1.0.0",
        "name": "smollm2:1.0.0",
        "displayName": "SmolLM2 135M",
        "modelType": "GGUF",
        "providerType": "Garrison",
        "uri": "garrison://models/smollm2/versions/1.0.0",
        "version": "1.0.0",
        "promptTemplate": {},
        "publisher": "HuggingFaceTB",
        "task": "chat-completion",
        "runtime": {"deviceType": "CPU", "executionProvider": "CPUExecutionProvider"},
        "fileSizeMb": 3,
        "modelSettings": {"parameters": []},
        "alias": "chat",
        "supportsToolCalling": False,
        "license": "Apache-2.0",
        "licenseDescription": "Use it, keep the notice.",
        "parentModelUri": "",
        "maxOutputTokens": 0,
        "minFLVersion": "",
        "cached": True,
        "createdAt": 1735689600,
        "contextLength": 2048,
        "inputModalities": "text",
        "outputModalities": "text",
        "capabilities": "",
    }
    assert (classify["name"], classify["modelType"]) == ("magika:3.3", "ONNX")


def test_a_model_is_shown_with_foundrys_and_openais_fields(api: LocalApi) -> None:
    shown = call(api, "GET", "/v1/models/smollm2:1.0.0")[1]
    assert (shown["id"], shown["object"], shown["created"]) == ("smollm2:1.0.0", "model", 1735689600)
    assert shown["owned_by"] == shown["publisher"] == "HuggingFaceTB"
    assert shown["runtime"] == {"deviceType": "CPU", "executionProvider": "CPUExecutionProvider"}
    assert (shown["cached"], shown["contextLength"], shown["loaded"]) == (True, 2048, True)


def test_status_and_lists(api: LocalApi) -> None:
    status = call(api, "GET", "/openai/status")[1]
    assert status["Endpoints"] == status["endpoints"] == api.endpoints
    assert status["ModelDirPath"] == status["modelDirPath"] == "/var/lib/garrison/blobs"
    assert status["PipeName"] == ""
    assert call(api, "GET", "/openai/models") == (200, ["magika:3.3", "smollm2:1.0.0"])
    assert call(api, "GET", "/openai/loadedmodels") == (200, ["smollm2:1.0.0"])
    assert call(api, "GET", "/openai/getgpudevice") == (200, -1)


@pytest.mark.parametrize(
    ("query", "keep_alive_s"),
    [
        ("", None),
        ("?ttl=600", 600.0),
        ("?unload=false", -1.0),
        ("?unload=false&ttl=30&ep=cpu", 30.0),
        ("?ttl=0&ep=CPUExecutionProvider", None),
    ],
)
def test_loading_says_how_long_a_model_stays(
    socket: Path, owner: LocalOwner, query: str, keep_alive_s: float | None
) -> None:
    assert call(socket, "GET", f"/openai/load/smollm2:1.0.0{query}") == (200, b"")
    assert owner.commands == [LoadModel("smollm2:1.0.0", keep_alive_s)]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/openai/load/chat?ttl=soon", 422, "api.keep_alive_malformed"),
        ("/openai/load/chat?ep=cuda", 422, "api.provider_unavailable"),
        ("/openai/load/nobody", 404, "model.unknown"),
        ("/openai/setgpudevice/1", 422, "api.device_unavailable"),
    ],
)
def test_what_cannot_be_is_refused_by_name(socket: Path, owner: LocalOwner, path: str, status: int, code: str) -> None:
    answered, body = call(socket, "GET", path)
    assert (answered, body["code"]) == ({422: 400}.get(status, status), code)
    assert owner.commands == []


def test_unloading(socket: Path, owner: LocalOwner) -> None:
    assert call(socket, "GET", "/openai/unload/chat?force=true") == (200, b"")
    assert call(socket, "GET", "/openai/unloadall") == (200, b"")  # one of the two models is loaded
    assert owner.commands == [UnloadModel("chat"), UnloadModel("chat")]


@pytest.mark.parametrize("path", ["load/chat", "unload/chat", "unloadall", "setgpudevice/0"])
def test_what_changes_models_is_refused_on_tcp(api: LocalApi, owner: LocalOwner, path: str) -> None:
    status, body = call(api, "GET", f"/openai/{path}")
    assert (status, body["code"]) == (403, "api.management_needs_socket")
    assert owner.commands == []


def test_downloads_are_refused_in_foundrys_words(api: LocalApi) -> None:
    def download(name: str) -> dict[str, Any]:
        status, body = call(api, "POST", "/openai/download", {"model": {"Name": name, "Uri": "azureml://x"}})
        assert status == 200  # its clients look into the body only
        assert isinstance(body, dict)
        return body

    refused = download("phi-4-mini:1")
    assert (refused["Success"], refused["success"]) == (False, False)
    assert "models come from the fleet" in refused["ErrorMessage"]
    assert refused["errorMessage"] == refused["ErrorMessage"]
    assert download("smollm2:1.0.0")["Success"] is True
    registered = call(api, "POST", "/openai/register", {"TypeName": "x", "ModelName": "chat", "BaseUri": "http://x"})
    assert registered[1]["Success"] is False


def test_counting_tokens_is_the_workers_business(api: LocalApi, worker: StandInWorker) -> None:
    body = {"model": "smollm2:1.0.0", "messages": [{"role": "user", "content": "hello"}]}
    assert call(api, "POST", COUNT, body)[0] == 200
    ((_, path, sent),) = worker.seen.requests
    assert (path, json.loads(sent)) == (COUNT, body)
    status, refused = call(api, "POST", COUNT, {**body, "model": "classify"})
    assert (status, refused["error"]["code"]) == (400, "api.wrong_protocol")
    assert call(api, "POST", COUNT, {})[1]["error"]["param"] == "model"
