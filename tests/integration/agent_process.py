"""An agent as a process over a state folder in which an enrolment and installed models lie, for tests to drive."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from garrison_agent.adapters.database import Database
from garrison_agent.adapters.slots import SlotStore
from garrison_agent.core.slot import Serving, Slot
from garrison_agent.identity import DeviceRecord, Folders, create_keys, save_pair, save_record
from garrison_protocol.manifest import (
    CHUNK_SIZE,
    ChatMessage,
    Evaluation,
    GenerateCase,
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
from tests.integration.runtimes.workers import magika_model, smollm2

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
        """Lay Magika out as a finished deployment leaves it."""
        tensor = Tensor(name="bytes", datatype="INT32", shape=(1, 2048), data=(65,) * 2048)
        case = LabelCase(id="one", inputs=(tensor,), output="target_label", expected_index=0)
        return self._install(
            magika_model(), "model.onnx", Engine.ONNXRUNTIME, case, name="magika", alias="files", task="file-type"
        )

    def install_text(self) -> PackageRef:
        """Lay SmolLM2 out likewise. Its file is linked, not copied, where that goes: change nothing in it."""
        case = GenerateCase(id="one", messages=(ChatMessage(role="user", content="Say hello"),), pattern=".")
        return self._install(
            smollm2(),
            "model.gguf",
            Engine.LLAMA_CPP,
            case,
            name="smollm2-135m-instruct",
            alias="smollm2",
            task="chat-completion",
        )

    def install_giant(self) -> PackageRef:
        """Lay Magika out once more, as a model that says to need a terabyte of memory."""
        tensor = Tensor(name="bytes", datatype="INT32", shape=(1, 2048), data=(65,) * 2048)
        case = LabelCase(id="one", inputs=(tensor,), output="target_label", expected_index=0)
        return self._install(
            magika_model(),
            "model.onnx",
            Engine.ONNXRUNTIME,
            case,
            name="giant",
            alias="giant",
            task="file-type",
            memory_mb=2**20,
        )

    def install_embeddings(self) -> PackageRef:
        """Lay SmolLM2 out once more, as a model that makes embeddings."""
        case = GenerateCase(id="one", messages=(ChatMessage(role="user", content="Say hello"),), pattern=".")
        return self._install(
            smollm2(),
            "model.gguf",
            Engine.LLAMA_CPP,
            case,
            name="smollm2-135m-embeddings",
            alias="embeddings",
            task="feature-extraction",
        )

    def _install(
        self,
        source: Path,
        path: str,
        engine: Engine,
        case: LabelCase | GenerateCase,
        *,
        name: str,
        alias: str,
        task: str,
        memory_mb: int = 0,
    ) -> PackageRef:
        data = source.read_bytes()
        chunks = pack_chunks(
            [hashlib.sha256(data[at : at + CHUNK_SIZE]).digest() for at in range(0, len(data), CHUNK_SIZE)]
        )
        file = ModelFile(
            path=path,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            chunks_sha256=hashlib.sha256(chunks).hexdigest(),
        )
        memory_mb = memory_mb or 100 + len(data) // 2**20 * 2
        variant = Variant(name="cpu", runtime=RuntimeSpec(engine=engine), files=(file,), memory_mb=memory_mb)
        manifest = Manifest(
            name=name,
            version="1.0.0",
            alias=alias,
            display_name=name,
            publisher="test",
            license="Apache-2.0",
            task=task,
            created_at="2026-11-01",
            variants=(variant,),
            evaluation=Evaluation(cases=(case,), min_accuracy=1),
        )
        body = manifest.model_dump_json().encode()
        ref = PackageRef(name=name, version="1.0.0", manifest_sha256=hashlib.sha256(body).hexdigest())
        where = self.state / "models" / name / "1.0.0"
        where.mkdir(parents=True)
        (where / "manifest.json").write_bytes(body)
        blob = self.state / "blobs" / "sha256" / file.sha256[:2] / file.sha256
        blob.parent.mkdir(parents=True, exist_ok=True)
        if engine is Engine.LLAMA_CPP and not blob.exists():
            with contextlib.suppress(OSError):
                os.link(source, blob)
        if not blob.exists():
            shutil.copyfile(source, blob)
        blob.with_name(f"{file.sha256}.chunks").write_bytes(chunks)
        database = Database(self.state / "agent.db")
        desired = DesiredAlias(alias=alias, package=ref, rollout="r1")
        SlotStore(database).save(
            Slot(
                alias,
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
