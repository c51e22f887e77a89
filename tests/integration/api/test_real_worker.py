"""The local API before a real model: who goes away stops its work at once, who reads nothing disturbs nobody."""

from __future__ import annotations

import json
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.api.commands import Command, GetMetrics
from garrison_agent.core.applications import Application, ApplicationTable, key_digest
from garrison_agent.core.exposition import gauge, histograms
from garrison_agent.core.meters import Meters
from garrison_agent.runtimes.process import resident_mb
from tests.fakes.api_site import CAMERA_KEY, Site, read_to_end
from tests.fakes.local_owner import LocalOwner, make_route
from tests.integration.runtimes.workers import WatchedWorker, eventually, llama_spec, smollm2

pytestmark = pytest.mark.integration
LONG = "Once upon a time there was a very long story about a board in a box. " * 100


@pytest.fixture(scope="module")
def llama() -> Iterator[WatchedWorker]:
    with (
        tempfile.TemporaryDirectory(prefix="garrison-") as name,
        WatchedWorker(llama_spec(smollm2(), Path(name) / "w.sock")) as worker,
    ):
        worker.ready()
        yield worker


@pytest.fixture(scope="module")
def site(llama: WatchedWorker) -> Iterator[Site]:
    meters = Meters()

    def answer(command: Command) -> object:
        assert isinstance(command, GetMetrics)
        return [*histograms(meters), gauge("garrison_board_memory_bytes", "Memory", 1)]

    meters.add("chat", llama_record(llama))
    with tempfile.TemporaryDirectory(prefix="garrison-") as name:
        running = Site(Path(name), LocalOwner(make_route(socket=llama.spec.socket), answer=answer))
        yield running
        running.api.stop()


def llama_record(llama: WatchedWorker) -> Any:
    llama.post("/v1/completions", {"prompt": "One two", "max_tokens": 3, "ignore_eos": True})
    return llama.record()


def ask(prompt: str, max_tokens: int, **options: object) -> bytes:
    body = json.dumps({"model": "chat", "prompt": prompt, "max_tokens": max_tokens, "stream": True, **options}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def active(llama: WatchedWorker) -> int:
    health = llama.health()
    return int(health["active"]) + int(health["queued"])


def test_a_client_that_goes_in_mid_prefill_stops_the_work(site: Site, llama: WatchedWorker) -> None:
    before = llama.health()["completion_tokens"]
    with site.raw() as client:
        client.sendall(ask(LONG, 100))
        eventually(lambda: active(llama) == 1, "the prompt is being read")
    eventually(lambda: active(llama) == 0, "nothing is being worked on")
    assert llama.health()["completion_tokens"] - before < 100


def test_a_client_that_goes_in_mid_stream_stops_the_work(site: Site, llama: WatchedWorker) -> None:
    before = llama.health()["completion_tokens"]
    with site.raw() as client:
        client.sendall(ask("Once upon a time", 1500, ignore_eos=True))
        assert b"data: " in client.recv(4096) + client.recv(4096)
    eventually(lambda: active(llama) == 0, "nothing is being worked on")
    assert llama.health()["completion_tokens"] - before < 1500


def test_readers_that_take_nothing_leave_room_and_memory_to_others(site: Site, llama: WatchedWorker) -> None:
    pid = llama.worker.pid
    assert pid is not None
    worker_mb, agent_mb = resident_mb(pid), resident_mb("self")
    stuck = []
    for _ in range(2):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", site.port))
        client.sendall(ask("Tell me everything", 150, ignore_eos=True))
        stuck.append(client)
    eventually(lambda: active(llama) == 2, "both are being answered")
    status, body, _ = site.call("POST", "/v1/completions", {"model": "chat", "prompt": "One", "max_tokens": 4})
    assert (status, body["usage"]["completion_tokens"] > 0) == (200, True)
    eventually(lambda: active(llama) == 0, "what nobody reads has been made, and holds no sequence")
    after_mb, own_mb = resident_mb(pid), resident_mb("self")
    assert after_mb is not None
    assert worker_mb is not None
    assert own_mb is not None
    assert agent_mb is not None
    assert after_mb - worker_mb < 64
    assert own_mb - agent_mb < 16
    for client in stuck:
        client.close()


def test_the_worker_records_who_asked(site: Site, llama: WatchedWorker) -> None:
    site.add()
    status, _, _ = site.call(
        "POST", "/v1/completions", {"model": "chat", "prompt": "One", "max_tokens": 2}, key=CAMERA_KEY
    )
    assert status == 200
    eventually(lambda: "camera" in {event.record.app for event in llama.events if hasattr(event, "record")}, "a record")


def test_a_deadline_ends_an_answer(site: Site, llama: WatchedWorker) -> None:
    with site.raw() as client:
        request = ask("Once upon a time", 1900, ignore_eos=True)
        client.sendall(request.replace(b"host: ", b"connection: close\r\nx-garrison-timeout: 0.5\r\nhost: "))
        text = read_to_end(client)
    assert b"deadline_exceeded" in text
    eventually(lambda: active(llama) == 0, "nothing is being worked on")


def test_prometheus_gets_its_page(site: Site, llama: WatchedWorker) -> None:
    status, page, response = site.call("GET", "/metrics")
    assert (status, response.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    text = page.decode()
    assert 'garrison_worker_requests{gen_ai_request_model="chat",state="active"} 0\n' in text
    assert re.search(r'^gen_ai_server_request_duration_seconds_bucket\{.*le="\+Inf"\} 1$', text, re.MULTILINE)
    assert 'garrison_api_requests_in_progress{door="tcp"} 1\n' in text
    site.applications = ApplicationTable(
        (Application("other", key_digest("gsk_other"), 0, models=frozenset({"another"})),)
    )
    text = site.call("GET", "/metrics", key="gsk_other")[1].decode()
    assert "gen_ai_request_model" not in text
    assert "garrison_board_memory_bytes{} 1\n" in text
    assert site.call("GET", "/metrics", key="gsk_wrong")[0] == 401
    assert 'garrison_api_refusals_total{code="api.key_unknown"} 1\n' in site.call("GET", "/metrics")[1].decode()
