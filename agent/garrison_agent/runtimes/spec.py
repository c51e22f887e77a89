"""What a worker is told to run: immutable facts, and their form on the worker's standard input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from garrison_protocol.states import Engine

Settings = Mapping[str, str | int | bool]


@dataclass(frozen=True)
class WorkerFile:
    """One file of the variant: its name in the package, what it must be, and where it lies on this board."""

    path: str
    sha256: str
    size: int
    disk_path: Path


@dataclass(frozen=True)
class Limits:
    """What a worker may take; 0: no limit. ``cpu_percent`` is of one core: 150 is one and a half."""

    memory_mb: int = 0
    cpu_percent: int = 0


@dataclass(frozen=True)
class WorkerSpec:
    """One model to run. ``files[0]`` is what the engine opens; ``model_id`` is ``<name>:<version>``.

    ``context_length`` (tokens) holds for each of the ``parallel`` requests that the engine may run at once.
    """

    model_id: str
    engine: Engine
    files: tuple[WorkerFile, ...]
    socket: Path
    threads: int
    context_length: int
    parallel: int
    settings: Settings
    execution_provider: str = ""
    """Of ONNX Runtime: names in order of preference, with commas; empty: the CPU."""
    limits: Limits = Limits()


@dataclass(frozen=True)
class OpenFile:
    """A file as the worker gets it: an open descriptor instead of a path."""

    path: str
    sha256: str
    size: int
    descriptor: int

    @property
    def native_path(self) -> str:
        """Return the path under which a native library opens exactly this file (it only takes paths)."""
        return f"/proc/self/fd/{self.descriptor}"


@dataclass(frozen=True)
class WorkerOrder:
    """The first line on a worker's standard input."""

    model_id: str
    engine: Engine
    files: tuple[OpenFile, ...]
    socket: str
    threads: int
    context_length: int
    parallel: int
    settings: Settings
    status_descriptor: int
    execution_provider: str = ""
    limits: Limits = Limits()
    group: str | None = None
    """Folder of the control group that the worker joins before it does anything else; None: it has none."""

    @property
    def name(self) -> str:
        """The package's name."""
        return self.model_id.partition(":")[0]

    @property
    def version(self) -> str:
        """The package's version."""
        return self.model_id.partition(":")[2]


def encode_order(
    spec: WorkerSpec, descriptors: tuple[int, ...], status_descriptor: int, group: str | None = None
) -> bytes:
    """Return the line that starts a worker; ``descriptors`` are those of ``spec.files``, in order."""
    order = {
        "model_id": spec.model_id,
        "engine": spec.engine.value,
        "files": [
            {"path": file.path, "sha256": file.sha256, "size": file.size, "descriptor": descriptor}
            for file, descriptor in zip(spec.files, descriptors, strict=True)
        ],
        "socket": str(spec.socket),
        "threads": spec.threads,
        "context_length": spec.context_length,
        "parallel": spec.parallel,
        "settings": dict(spec.settings),
        "status_descriptor": status_descriptor,
        "limits": asdict(spec.limits),
        "group": group,
        "execution_provider": spec.execution_provider,
    }
    return json.dumps(order, separators=(",", ":")).encode() + b"\n"


def decode_order(line: bytes) -> WorkerOrder:
    """Return the order in ``line``, which our own parent process wrote."""
    order = json.loads(line)
    return WorkerOrder(
        model_id=order["model_id"],
        engine=Engine(order["engine"]),
        files=tuple(OpenFile(**file) for file in order["files"]),
        socket=order["socket"],
        threads=order["threads"],
        context_length=order["context_length"],
        parallel=order["parallel"],
        settings=order["settings"],
        status_descriptor=order["status_descriptor"],
        limits=Limits(**order["limits"]),
        group=order["group"],
        execution_provider=order["execution_provider"],
    )
