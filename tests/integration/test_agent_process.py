"""The agent as a process, with every port of its controller and broker closed: it must be useful alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.adapters.database import Database
from garrison_agent.adapters.slots import SlotStore
from garrison_agent.core.slot import Serving, Slot
from garrison_agent.identity import DeviceRecord, Folders, create_keys, save_pair, save_record
from garrison_protocol.manifest import (
    CHUNK_SIZE,
    Evaluation,
    LabelCase,
    Manifest,
    ModelFile,
    PackageRef,
    RuntimeSpec,
    Tensor,
    Variant,
    pack_chunks,
)
from garrison_protocol.messages.desired import DesiredAlias
from garrison_protocol.states import DeploymentState, Engine
from tests.fakes.pki import FleetPki
from tests.integration.runtimes.workers import magika_model

pytestmark = pytest.mark.integration
DEADLINE_S = 60.0


class AgentProcess:
    """``garrison-agent run`` over a state folder in which an enrolment and one installed model lie."""

    def __init__(self, folder: Path) -> None:
        self.state, self.run = folder / "state", folder / "run"
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'state_dir = "{self.state}"\nruntime_dir = "{self.run}"\n'
            '[api]\ntcp = "off"\n[telemetry]\ninterval_s = 1\nheartbeat_s = 1\n'
        )
        self.log = folder / "agent.log"
        self.child: subprocess.Popen[bytes] | None = None

    def enrol(self, folder: Path) -> None:
        pki = FleetPki(folder)
        create_keys(self.state)
        folders = Folders(self.state)
        folders.server_ca.parent.mkdir(parents=True)
        folders.server_ca.write_bytes(pki.server_ca.pem.read_bytes())
        folders.root.write_bytes(b"{}")
        issued = pki.issue("edge-1")
        save_pair(self.state, issued.cert.read_bytes() + issued.key.read_bytes())
        save_record(
            self.state,
            DeviceRecord(
                device="edge-1",
                url=f"https://127.0.0.1:{_closed_port()}",
                mqtt_host="127.0.0.1",
                mqtt_port=_closed_port(),
                token_sha256="0" * 64,
            ),
        )

    def install(self) -> PackageRef:
        """Lay the model out as a finished deployment leaves it."""
        data = magika_model().read_bytes()
        chunks = pack_chunks(
            [hashlib.sha256(data[at : at + CHUNK_SIZE]).digest() for at in range(0, len(data), CHUNK_SIZE)]
        )
        file = ModelFile(
            path="model.onnx",
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            chunks_sha256=hashlib.sha256(chunks).hexdigest(),
        )
        variant = Variant(name="cpu", runtime=RuntimeSpec(engine=Engine.ONNXRUNTIME), files=(file,), memory_mb=100)
        tensor = Tensor(name="bytes", datatype="INT32", shape=(1, 1), data=(0,))
        case = LabelCase(id="one", inputs=(tensor,), output="target_label", expected_index=0)
        manifest = Manifest(
            name="magika",
            version="1.0.0",
            alias="files",
            display_name="Magika",
            publisher="test",
            license="Apache-2.0",
            task="file-type",
            created_at="2026-11-01",
            variants=(variant,),
            evaluation=Evaluation(cases=(case,), min_accuracy=1),
        )
        body = manifest.model_dump_json().encode()
        ref = PackageRef(name="magika", version="1.0.0", manifest_sha256=hashlib.sha256(body).hexdigest())
        where = self.state / "models" / "magika" / "1.0.0"
        where.mkdir(parents=True)
        (where / "manifest.json").write_bytes(body)
        blob = self.state / "blobs" / "sha256" / file.sha256[:2] / file.sha256
        blob.parent.mkdir(parents=True)
        blob.write_bytes(data)
        database = Database(self.state / "agent.db")
        desired = DesiredAlias(alias="files", package=ref, rollout="r1")
        SlotStore(database).save(
            Slot(
                "files",
                ref,
                "r1",
                desired,
                state=DeploymentState.ACTIVE,
                variant="cpu",
                serving=Serving(ref, "cpu"),
            )
        )
        database.close()
        return ref

    @property
    def blob(self) -> Path:
        (path,) = (path for path in (self.state / "blobs").glob("sha256/??/*") if len(path.name) == 64)
        return path

    def start(self, **environment: str) -> None:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "garrison_agent", "--config", str(self.config), "run"],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    def end(self, number: signal.Signals, timeout_s: float = 10.0) -> int:
        assert self.child is not None
        self.child.send_signal(number)
        return self.child.wait(timeout_s)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = _UnixConnection(self.run / "agent.sock")
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def status(self) -> Any:
        return self.ask("GET", "/garrison/v1/status")[1]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if condition():
                    return
            assert self.child is not None
            assert self.child.poll() is None, self.log.read_text()
            time.sleep(0.05)  # between looks at a condition with a deadline
        raise AssertionError(self.log.read_text())

    def alias(self) -> Any:
        return self.status()["aliases"][0]


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
