"""Several applications at one local API: who they are, what they may use, how much, and for how long they wait."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from garrison_agent.api.commands import AddApp, Command, ListApps
from garrison_agent.cli.client import AgentClient
from garrison_protocol.errors import InvalidError
from garrison_protocol.states import Engine
from tests.fakes.api_site import ADMIN_KEY, CAMERA_KEY, DEADLINE_S, Site, chat_request
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.worker_server import StandInWorker
from tests.integration.api.conftest import Open

pytestmark = pytest.mark.integration


@pytest.fixture
def site(open_site: Open, worker: StandInWorker) -> Site:
    other = make_route("files", socket=worker.path, name="magika", engine=Engine.ONNXRUNTIME)
    return open_site(LocalOwner(make_route(socket=worker.path), other, make_route("big", socket=worker.path, name="b")))


def test_the_worker_hears_who_asks(site: Site, worker: StandInWorker) -> None:
    site.add()
    assert site.chat()[0] == 200
    assert site.chat(key=CAMERA_KEY, x_garrison_app="root")[0] == 200
    assert site.chat(x_api_key=CAMERA_KEY)[0] == 200
    assert site.chat(key="ollama")[0] == 200  # what a client sends that must send something
    with site.raw(unix=True) as connection:
        connection.sendall(chat_request("hello", close=True))
        while connection.recv(65536):
            pass
    apps = [headers["x-garrison-app"] for headers in worker.seen.headers]
    assert apps[:4] == ["local", "camera", "camera", "local"]
    assert apps[4].startswith("uid:")


def test_a_wrong_key_is_refused_even_where_none_is_needed(site: Site, worker: StandInWorker) -> None:
    status, body, response = site.chat(key="gsk_" + "00" * 32)
    assert status == 401
    assert (body["error"]["type"], body["error"]["code"]) == ("authentication_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    site.add()
    assert site.chat(key=CAMERA_KEY)[0] == 200
    site.applications = site.applications.removed("camera")
    assert site.chat(key=CAMERA_KEY)[0] == 401  # at once
    assert len(worker.seen.requests) == 1


def test_an_application_sees_and_uses_its_models_alone(site: Site, worker: StandInWorker) -> None:
    site.add(models=frozenset({"smollm2", "files"}))
    listed = site.call("GET", "/v1/models", key=CAMERA_KEY)[1]["data"]
    assert [model["id"] for model in listed] == ["chat", "files"]
    assert len(site.call("GET", "/v1/models")[1]["data"]) == 3
    tags = site.call("GET", "/api/tags", key=CAMERA_KEY)[1]["models"]
    assert not any("big" in model["name"] for model in tags)
    assert "b:1.0.0" not in site.call("GET", "/models/loaded", key=CAMERA_KEY)[1]
    assert site.chat(key=CAMERA_KEY)[0] == 200
    status, body, _ = site.chat(model="big", key=CAMERA_KEY)
    assert (status, body["error"]["type"], body["error"]["param"]) == (403, "permission_error", "model")
    assert site.call("GET", "/v1/models/big", key=CAMERA_KEY)[0] == 403
    status, body, _ = site.chat(model="nobody", key=CAMERA_KEY)
    assert (status, "big" in body["error"]["message"]) == (404, False)
    assert len(worker.seen.requests) == 1


def test_the_openai_client_understands_the_rate_limit(site: Site) -> None:
    site.add(requests_per_min=2)
    with openai.OpenAI(base_url=f"{site.api.endpoints[0]}/v1", api_key=CAMERA_KEY, max_retries=0) as client:
        answer = client.chat.completions.with_raw_response.create(
            model="chat", messages=[{"role": "user", "content": "one"}]
        )
        assert answer.headers["x-ratelimit-remaining-requests"] == "1"
        client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "two"}])
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "three"}])
        assert limited.value.type == "rate_limit_error"
        assert 0 < int(limited.value.response.headers["retry-after"]) <= 31
        client.models.list()  # costs nothing
    assert site.chat()[0] == 200  # others are not meant


def test_a_streams_place_is_free_when_its_client_goes(site: Site, worker: StandInWorker) -> None:
    site.add(concurrent=1)
    connection = site.http()
    body = json.dumps({"model": "chat", "stream": True, "messages": [{"role": "user", "content": "step"}]})
    connection.request("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {CAMERA_KEY}"})
    response = connection.getresponse()
    status, answer, refused = site.chat(key=CAMERA_KEY)
    assert (status, answer["error"]["code"], refused.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    response.close()
    connection.close()
    assert worker.seen.client_gone.wait(DEADLINE_S)
    assert any(site.chat(key=CAMERA_KEY)[0] == 200 for _ in range(200))


def test_a_door_that_needs_keys(open_site: Open, worker: StandInWorker) -> None:
    site = open_site(LocalOwner(make_route(socket=worker.path), answer=answer), tcp_keys=True)
    for path in ("/v1/models", "/v2", "/api/tags", "/status", "/metrics", "/garrison/v1/status", "/garrison/v1/apps"):
        assert site.call("GET", path)[0] == 401, path
        assert site.call("GET", path, key="none")[0] == 401, path
    site.add()
    site.add("console", ADMIN_KEY, admin=True)
    assert site.chat(key=CAMERA_KEY)[0] == 200
    for key, status in ((CAMERA_KEY, 403), (ADMIN_KEY, 200)):
        assert site.call("GET", "/garrison/v1/apps", key=key)[0] == status
        assert site.call("POST", "/garrison/v1/models/chat/unload", key=key)[0] == status
    assert site.call("GET", "/garrison/v1/apps", key=ADMIN_KEY, host="evil.example")[0] == 403
    assert site.call("GET", "/garrison/v1/apps", key=ADMIN_KEY, origin="https://evil.example")[0] == 403
    assert AgentClient(site.socket).get("apps") == []  # the unix socket needs no key


def answer(command: Command) -> object:
    match command:
        case ListApps():
            return []
        case AddApp():
            return {"name": command.name, "key": "gsk_new"}
        case _:
            return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "unloaded"}


def test_applications_are_added_by_managers_alone(open_site: Open) -> None:
    site = open_site(LocalOwner(answer=answer))
    assert site.call("POST", "/garrison/v1/apps", {"name": "camera"})[0] == 403
    assert site.owner.commands == []
    agent = AgentClient(site.socket)
    assert agent.post("apps", body={"name": "camera", "models": ["a"], "concurrent": 2})["key"] == "gsk_new"
    assert site.owner.commands == [AddApp("camera", ("a",), concurrent=2)]
    for body in ({}, {"name": 7}, {"name": "a", "rate": 5}, {"name": "a", "concurrent": -1}, {"name": "a", "admin": 1}):
        with pytest.raises(InvalidError, match=r"app\.malformed"):
            agent.post("apps", body=body)


def test_a_request_may_say_how_long_it_has(site: Site, worker: StandInWorker) -> None:
    assert site.chat(x_garrison_timeout="2.5")[0] == 200
    assert 0 < int(worker.seen.headers[0]["x-garrison-timeout-ms"]) <= 2500
    status, body, _ = site.chat(x_garrison_timeout="soon")
    assert (status, body["error"]["code"]) == (400, "api.timeout_malformed")
    assert len(worker.seen.requests) == 1


def test_a_worker_that_forgets_the_time_is_left(open_site: Open, worker: StandInWorker) -> None:
    site = open_site(LocalOwner(make_route(socket=worker.path)), request_timeout_s=0.2)
    status, body, _ = site.chat("hang")
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    assert worker.seen.client_gone.wait(DEADLINE_S)
    connection = site.raw()
    with connection:
        connection.sendall(chat_request("step", close=True))
        text = b"".join(iter(lambda: connection.recv(65536), b""))
    event = json.loads(text.partition(b"data: ")[2].partition(b"\n\n")[0])
    assert event["error"]["code"] == "deadline_exceeded"


def test_the_time_runs_while_a_model_loads(open_site: Open) -> None:
    site = open_site(LocalOwner(make_route()))  # the owner never answers
    status, body, _ = site.chat(x_garrison_timeout="0.1")
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


def test_a_full_queue_says_when_to_come_back(site: Site) -> None:
    status, body, response = site.chat("full")
    assert (status, body["error"]["code"]) == (503, "queue_full")
    assert int(response.headers["retry-after"]) > 0


def test_keys_are_never_logged(site: Site, caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    site.add()
    with caplog.at_level("DEBUG"):
        site.chat(key=CAMERA_KEY)
        site.chat("die", key=CAMERA_KEY)
        site.chat(key=CAMERA_KEY + "0")
    assert "gsk_" not in caplog.text
