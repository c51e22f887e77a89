"""A loaded ONNX model: how its session is set up, which provider really runs it, and one run at a time.

Importing this loads the native library; the worker does so only after it has verified the files.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_agent.runtimes.spec import Settings
from garrison_agent.runtimes.tensors.tensor import Array, TensorSpec
from garrison_protocol.errors import InvalidError, UnavailableError

# Before the import: its Linux wheels upload telemetry otherwise, whatever is switched off afterwards.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
onnxruntime: Any = importlib.import_module("onnxruntime")  # it ships no types

CPU = "CPUExecutionProvider"
_REMOTE = "AzureExecutionProvider"
"""Runs nothing here, but sends a model's inputs to a service on the network."""
_FATAL_ONLY = 4
_MAX_MESSAGE = 400
_NOWHERE = "/dev/null/none"
"""Where weights outside of the model's file would be looked for: they were not verified, and might be any file here."""

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""ONNX Runtime's names of types -> the protocol's."""

_OPTIMIZATION = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


class TensorSettings(BaseModel):
    """What a manifest's ``model_settings`` say of a tensor model (docs/operations.md); other keys are others'."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    graph_optimization: Literal["off", "basic", "extended", "all"] = "all"
    memory_arena: Literal["keep", "shrink", "off"] = "keep"
    """What a run allocated is kept for the next one, given back after each, or never pooled."""
    spinning: bool = False
    """Threads that wait for work burn their core for a little less latency; a board has better uses for it."""
    required_provider: bool = False
    """Fail rather than run on another provider than the first that the manifest names."""
    batching: bool = True
    """Let requests share a run where that was measured to help."""
    request_timeout_s: int = Field(default=60, ge=1, le=86400)
    max_rows: int = Field(default=64, ge=1, le=1_000_000)
    """Of a first dimension that may have any size: what a run allocates grows with it, and stays allocated."""


def read_settings(settings: Settings) -> TensorSettings:
    """Return the settings of a tensor model.

    Raises:
        InvalidError: ``manifest.malformed``.
    """
    try:
        return TensorSettings.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidError(
            "manifest.malformed", f"model_settings: {first['loc'][0]}: {first['msg']}", hint="correct the package"
        ) from error


@dataclass(frozen=True)
class Providers:
    """What runs the model: ONNX Runtime's providers in order, and why others that were wanted do not."""

    running: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)


class SessionRun:
    """One run of a session. ``stop`` may be called from any thread."""

    def __init__(self, session: Any, *, shrink: bool) -> None:
        self._session = session
        self._options = onnxruntime.RunOptions()
        if shrink:
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        """Return the ``outputs`` asked for, by name.

        Raises:
            UnavailableError: ``oip.infer_failed``: the model failed on these inputs, or the run was stopped.
        """
        try:
            arrays = self._session.run(list(outputs), inputs, self._options)
        except Exception as error:
            raise UnavailableError("oip.infer_failed", f"the model failed on these inputs: {_short(error)}") from error
        return dict(zip(outputs, arrays, strict=True))

    def stop(self) -> None:
        """End the run at its next operator."""
        self._options.terminate = True


class Session:
    """A loaded ONNX model."""

    def __init__(self, path: str, threads: int, settings: TensorSettings, execution_provider: str = "") -> None:
        """Load ``path`` on the first provider of the comma-separated ``execution_provider`` that works, or the CPU.

        Raises:
            InvalidError: ``model.load_failed``: not an ONNX file that this ONNX Runtime can run as tensors.
            UnavailableError: ``model.provider_unavailable``: the required provider does not work here.
        """
        self._shrink = settings.memory_arena == "shrink"
        wanted = list(dict.fromkeys(name.strip() for name in execution_provider.split(",") if name.strip())) or [CPU]
        usable, missing = _usable(wanted, onnxruntime.get_available_providers())
        if settings.required_provider and wanted[0] in missing:
            raise _unavailable(wanted[0], missing[wanted[0]])
        try:
            self._session = onnxruntime.InferenceSession(path, _options(threads, settings), providers=usable)
        except Exception as error:
            raise InvalidError(
                "model.load_failed",
                f"ONNX Runtime cannot load this file: {_short(error)}",
                hint="check the package on a workstation, and that the agent's onnxruntime is recent enough",
            ) from error
        running = tuple(self._session.get_providers())
        missing |= {name: "ONNX Runtime could not start it here" for name in usable if name not in running}
        if settings.required_provider and wanted[0] in missing:
            raise _unavailable(wanted[0], missing[wanted[0]])
        self.providers = Providers(running, missing)
        self.inputs = [_spec(item) for item in self._session.get_inputs()]
        self.outputs = [_spec(item) for item in self._session.get_outputs()]

    def new_run(self) -> SessionRun:
        """Return a run that has not begun."""
        return SessionRun(self._session, shrink=self._shrink)


def _options(threads: int, settings: TensorSettings) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY  # what goes wrong is raised too
    options.enable_cpu_mem_arena = settings.memory_arena != "off"
    level = _OPTIMIZATION[settings.graph_optimization]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings.spinning)))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NOWHERE)
    return options


def _usable(wanted: Iterable[str], available: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the providers to ask for, the CPU last, and why the others are left out."""
    here = list(available)
    missing = {}
    usable = []
    for name in wanted:
        if name == _REMOTE:
            missing[name] = "it sends inputs to a service on the network, which no model of a board may do"
        elif name not in here:
            missing[name] = f"this build of ONNX Runtime lacks it; it has {', '.join(here)}"
        else:
            usable.append(name)
    return [*usable, *([] if CPU in usable else [CPU])], missing


def _unavailable(provider: str, why: str) -> UnavailableError:
    return UnavailableError(
        "model.provider_unavailable",
        f"the package requires {provider}: {why}",
        hint="install the onnxruntime build of this board's vendor, or roll out a variant for its CPU",
    )


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def _spec(item: Any) -> TensorSpec:
    datatype = _DATATYPES.get(item.type)
    if datatype is None:
        raise InvalidError("model.load_failed", f"{item.name} is a {item.type}; only plain tensors can be served")
    return TensorSpec(item.name, datatype, tuple(size if isinstance(size, int) else -1 for size in item.shape))
