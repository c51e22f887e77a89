"""Requests in flight as the owner thread sees them, and requests for models that are on their way out of memory."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from garrison_agent.api.commands import Command, LoadModel
from garrison_agent.api.routes import RouteTable
from garrison_agent.api.traffic import Traffic
from garrison_protocol.errors import InsufficientError
from tests.fakes.api_site import DEADLINE_S, chat_request
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.worker_server import StandInWorker
from tests.integration.api.conftest import Open

pytestmark = pytest.mark.integration


def test_a_request_counts_until_its_answer_has_ended(open_site: Open, worker: StandInWorker) -> None:
    idle = threading.Event()
    traffic = Traffic(time.monotonic, on_idle=idle.set)
    site = open_site(LocalOwner(make_route(socket=worker.path)), traffic=traffic)
    with site.raw() as client:
        client.sendall(chat_request("step"))
        worker.seen.release.release()
        assert worker.seen.first_event_sent.wait(DEADLINE_S)
        traffic.await_idle(worker.path)
        assert not traffic.retire(worker.path)
        assert not idle.is_set()
    assert idle.wait(DEADLINE_S)  # the client left
    assert traffic.look(worker.path).active == 0
    assert site.chat("hello")[0] == 200
    assert traffic.retire(worker.path)


@pytest.mark.parametrize("prompt", ["die unheard", "garble", "reject"])
def test_a_request_that_fails_does_not_count_for_ever(open_site: Open, worker: StandInWorker, prompt: str) -> None:
    traffic = Traffic(time.monotonic)
    site = open_site(LocalOwner(make_route(socket=worker.path)), traffic=traffic)
    assert site.chat(prompt)[0] >= 400
    assert traffic.retire(worker.path)


def test_nobody_listening_does_not_count_either(open_site: Open, folder: Path) -> None:
    traffic = Traffic(time.monotonic)
    site = open_site(LocalOwner(make_route(socket=folder / "gone.sock")), traffic=traffic)
    status, body, _ = site.chat()
    assert (status, body["error"]["code"]) == (503, "worker.unreachable")
    assert traffic.retire(folder / "gone.sock")


@pytest.mark.parametrize("swapped", [False, True], ids=["table not swapped yet", "table swapped"])
def test_a_request_for_a_model_that_leaves_has_it_loaded_again(
    open_site: Open, worker: StandInWorker, folder: Path, swapped: bool
) -> None:
    traffic = Traffic(time.monotonic)
    leaving = folder / "leaving.sock"
    assert traffic.retire(leaving)
    tables = [RouteTable((make_route(socket=leaving),)), RouteTable((make_route(socket=None if swapped else leaving),))]

    def load(command: Command) -> object:
        owner.table = RouteTable((make_route(socket=worker.path),))
        tables.clear()
        return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "loaded"}

    owner = LocalOwner(answer=load)

    def read() -> RouteTable:
        return tables.pop(0) if len(tables) > 1 else tables[0] if tables else owner.table

    owner.read = read  # type: ignore[method-assign]
    site = open_site(owner, traffic=traffic)
    status, body, _ = site.chat("hello there")
    assert (status, owner.commands) == (200, [LoadModel("chat", waits=True)])
    assert body["choices"][0]["message"]["content"] == "hello there"


def test_a_model_that_was_given_up_is_not_started_for_a_request(open_site: Open) -> None:
    owner = LocalOwner(replace(make_route(), failure="its worker was ended by the kernel, out of memory"))
    site = open_site(owner)
    status, body, response = site.chat()
    assert (status, body["error"]["code"]) == (503, "model.failed")
    assert "out of memory" in body["error"]["message"]
    assert int(response.headers["retry-after"]) > 0
    assert owner.commands == []


def test_a_request_that_a_dying_worker_did_not_read_goes_to_its_successor(
    open_site: Open, worker: StandInWorker, folder: Path
) -> None:
    dying = folder / "dying.sock"
    owner = LocalOwner(make_route(socket=dying))
    site = open_site(owner)

    def die(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while b"hello there" not in connection.recv(65536, socket.MSG_PEEK):
                pass  # it comes, and nobody reads it
            owner.table = RouteTable((make_route(socket=worker.path),))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dying))
        listener.listen()
        thread = threading.Thread(target=die, args=(listener,))
        thread.start()
        status, body, _ = site.chat("hello there")
        thread.join(DEADLINE_S)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "hello there")


def test_a_worker_whose_end_the_owner_has_not_heard_of_yet_is_waited_for(
    open_site: Open, worker: StandInWorker, folder: Path
) -> None:
    gone, reads = make_route(socket=folder / "gone.sock"), itertools.count()
    owner = LocalOwner()
    late = RouteTable((make_route(socket=worker.path),))
    owner.read = lambda: RouteTable((gone,)) if next(reads) < 6 else late  # type: ignore[method-assign]
    assert open_site(owner).chat()[0] == 200


@pytest.mark.parametrize("end", ["let go", "evicted", "deadline"])
def test_requests_wait_while_somebody_waits_for_the_models_memory(
    open_site: Open, worker: StandInWorker, folder: Path, end: str
) -> None:
    traffic = Traffic(time.monotonic)
    leaving = folder / "leaving.sock"
    held = worker.path if end == "let go" else leaving
    owner = LocalOwner(make_route(socket=held))

    def load(command: Command) -> object:
        owner.table = RouteTable((make_route(socket=worker.path),))
        return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "loaded"}

    owner.answer = load
    site = open_site(owner, traffic=traffic)
    traffic.hold(held, 600)
    answers: list[tuple[int, object]] = []
    headers = {"x_garrison_timeout": "0.3"} if end == "deadline" else {}
    asking = threading.Thread(target=lambda: answers.append(site.chat("hello there", **headers)[:2]))
    asking.start()
    if end != "deadline":
        asking.join(0.5)
        assert asking.is_alive()
        assert (worker.seen.requests, owner.commands) == ([], [])
    if end == "let go":
        traffic.hold(held, 0)
    elif end == "evicted":
        assert traffic.retire(held)
    asking.join(DEADLINE_S)
    assert not asking.is_alive()
    assert [status for status, _ in answers] == [504 if end == "deadline" else 200]
    assert owner.commands == ([LoadModel("chat", waits=True)] if end == "evicted" else [])
    assert traffic.look(held).active == 0


@pytest.mark.parametrize("passing", [True, False], ids=["in use", "pinned"])
def test_a_request_waits_for_memory_that_others_use_for_a_while(
    open_site: Open, worker: StandInWorker, passing: bool
) -> None:
    refusals = [InsufficientError("memory.busy", "held by another", retryable=passing)] * 2

    def load(command: Command) -> object:
        if refusals:
            return refusals.pop()
        owner.table = RouteTable((make_route(socket=worker.path),))
        return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "loaded"}

    owner = LocalOwner(make_route(), answer=load)
    status, _, response = open_site(owner).chat()
    assert (status, len(owner.commands)) == ((200, 3) if passing else (507, 1))
    assert "retry-after" not in response.headers
