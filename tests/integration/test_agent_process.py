"""The agent as a process, with every port of its controller and broker closed: it must be useful alone."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from garrison_agent.adapters.database import Database
from tests.integration.agent_process import DEADLINE_S, AgentProcess

pytestmark = pytest.mark.integration


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    process = AgentProcess(tmp_path)
    process.enrol(tmp_path)
    process.install()
    yield process
    if process.child is not None and process.child.poll() is None:
        process.end(signal.SIGKILL)


def infer(agent: AgentProcess) -> int:
    inputs = [{"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": [65] * 2048}]
    status, body = agent.ask("POST", "/v2/models/files/infer", {"inputs": inputs})
    assert status == 200, body
    return len(body["outputs"][0]["data"])


def has_recorded_more(agent: AgentProcess, before: int) -> bool:
    return bool(agent.status()["outbox"]["audit"]["last"] > before)


def test_alone_it_serves_is_killed_and_serves_again(agent: AgentProcess) -> None:
    for _ in range(2):
        agent.start()
        agent.wait_for(lambda: bool(agent.alias()["loaded"]))
        assert infer(agent) > 100
        status = agent.status()
        assert (status["device"], status["connected"], agent.alias()["state"]) == ("edge-1", False, "ACTIVE")
        before = status["outbox"]["audit"]["last"]
        agent.wait_for(partial(has_recorded_more, agent, before))
        agent.wait_for(lambda: agent.status()["outbox"]["telemetry"]["pending"] > 0)
        assert agent.end(signal.SIGKILL) == -signal.SIGKILL
    agent.start()
    agent.wait_for(lambda: bool(agent.alias()["loaded"]))
    assert agent.end(signal.SIGTERM) == 0
    assert not list((agent.run / "workers").glob("*.sock"))


def test_unload_and_load_over_the_socket(agent: AgentProcess) -> None:
    agent.start()
    agent.wait_for(lambda: bool(agent.alias()["loaded"]))
    assert agent.ask("POST", "/garrison/v1/models/files/unload")[1]["outcome"] == "unloaded"
    assert not agent.alias()["loaded"]
    assert infer(agent) > 100  # a request loads it again


def test_a_flipped_byte_is_refused_recorded_and_being_repaired(agent: AgentProcess) -> None:
    agent.start()
    agent.wait_for(lambda: bool(agent.alias()["loaded"]))
    agent.ask("POST", "/garrison/v1/models/files/unload")
    before = agent.blob.stat()
    with agent.blob.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(agent.blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    status, error = agent.ask("POST", "/garrison/v1/models/files/load")
    assert (status, error["code"]) == (503, "model.repairing")
    assert agent.alias()["state"] == "REPAIRING"
    assert agent.end(signal.SIGTERM) == 0
    database = Database(agent.state / "agent.db")
    kinds = [kind for (kind,) in database.connection.execute("SELECT kind FROM entry WHERE stream = 'audit'")]
    database.close()
    assert "model.corrupt" in kinds
    assert kinds[-1] == "agent.stopped"


def test_systemd_is_told(agent: AgentProcess, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(DEADLINE_S)
        agent.start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="1000000")
        seen: list[str] = []
        while not any("WATCHDOG=1" in line for line in seen):
            seen.append(listener.recv(4096).decode())
        assert seen[0].startswith("READY=1")
        assert agent.end(signal.SIGTERM) == 0
        while "STOPPING=1" not in seen[-1]:
            seen.append(listener.recv(4096).decode())


def test_a_board_that_is_not_enrolled_says_what_to_do(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path)
    agent.start()
    assert agent.child is not None
    assert agent.child.wait(DEADLINE_S) == 4
    assert "garrison-agent enroll" in agent.log.read_text()


def test_a_second_agent_over_the_same_folder_is_refused(agent: AgentProcess) -> None:
    agent.start()
    agent.wait_for(lambda: bool(agent.alias()["loaded"]))
    first, agent.child = agent.child, None
    agent.start()
    assert agent.child is not None
    assert agent.child.wait(DEADLINE_S) == 5
    assert "database.in_use" in agent.log.read_text() or "stop it first" in agent.log.read_text()
    agent.child = first
    assert infer(agent) > 100
