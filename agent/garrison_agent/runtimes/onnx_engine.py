"""The ONNX Runtime engine of a worker: one session, served over the Open Inference Protocol.

Importing this loads the native library; the worker does so only after it has verified the files. Source: Open
Inference Protocol, "HTTP/REST".
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from garrison_agent.runtimes.asgi import (
    Application,
    BodyTooLargeError,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    read_body,
    send_json,
)
from garrison_agent.runtimes.oip import Array, InferRequest, TensorSpec, encode_outputs, parse_infer
from garrison_agent.runtimes.spec import WorkerOrder
from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError, UnavailableError

# Before the import: its Linux wheels upload telemetry otherwise, whatever is switched off afterwards.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
onnxruntime: Any = importlib.import_module("onnxruntime")  # it ships no types

INTERNAL = "/internal"
_FATAL_ONLY = 4
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


async def load(order: WorkerOrder, record: Callable[[RequestRecord], None]) -> tuple[Application, dict[str, Any]]:
    """Return the application that serves the model, and the model's facts.

    Raises:
        InvalidError: ``model.load_failed``.
    """
    # Everything native happens in this one thread.
    thread = ThreadPoolExecutor(1, thread_name_prefix="infer")
    session = await asyncio.get_running_loop().run_in_executor(
        thread, Session, order.files[0].native_path, order.threads
    )
    facts = {
        "inputs": [spec.to_dict() for spec in session.inputs],
        "outputs": [spec.to_dict() for spec in session.outputs],
    }
    return OipApi(order.name, order.version, session, thread, record), facts


class Session:
    """A loaded ONNX model."""

    def __init__(self, path: str, threads: int) -> None:
        """Load ``path`` on the CPU.

        Raises:
            InvalidError: ``model.load_failed``: not an ONNX file that this ONNX Runtime can run as tensors.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY  # what goes wrong is raised too
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NOWHERE)
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InvalidError(
                "model.load_failed",
                f"ONNX Runtime cannot load this file: {error}",
                hint="check the package on a workstation, and that the agent's onnxruntime is recent enough",
            ) from error
        self.inputs = [_spec(item) for item in self._session.get_inputs()]
        self.outputs = [_spec(item) for item in self._session.get_outputs()]

    def run(self, request: InferRequest) -> dict[str, Array]:
        """Return the outputs asked for, by name.

        Raises:
            UnavailableError: ``oip.infer_failed``: the model failed on these inputs.
        """
        try:
            arrays = self._session.run(list(request.outputs), request.inputs)
        except Exception as error:
            raise UnavailableError("oip.infer_failed", f"the model failed on these inputs: {error}") from error
        return dict(zip(request.outputs, arrays, strict=True))


def _spec(item: Any) -> TensorSpec:
    datatype = _DATATYPES.get(item.type)
    if datatype is None:
        raise InvalidError("model.load_failed", f"{item.name} is a {item.type}; only plain tensors can be served")
    return TensorSpec(item.name, datatype, tuple(size if isinstance(size, int) else -1 for size in item.shape))


@dataclass(frozen=True)
class _Path:
    """A path under ``/v2/models/<name>``; any name is this model's, the agent has routed it already."""

    version: str | None
    verb: str

    @staticmethod
    def parse(path: str) -> _Path | None:
        match path.split("/"):
            case ["", "v2", "models", _, "versions", version, *rest] if len(rest) <= 1:
                return _Path(version, rest[0] if rest else "")
            case ["", "v2", "models", _, *rest] if len(rest) <= 1:
                return _Path(None, rest[0] if rest else "")
            case _:
                return None


class OipApi:
    """The ASGI application of a tensor model. ``/internal/v2/...`` is the gate's: answered alike, not recorded."""

    def __init__(
        self,
        name: str,
        version: str,
        session: Session,
        thread: ThreadPoolExecutor,
        record: Callable[[RequestRecord], None],
    ) -> None:
        self._name = name
        self._version = version
        self._session = session
        self._thread = thread
        self._record = record
        self._datatypes = {spec.name: spec.datatype for spec in session.outputs}
        self._active = 0
        self._done = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path: str = scope["path"]
        internal = path.startswith(INTERNAL + "/")
        try:
            await self._answer(scope["method"], path.removeprefix(INTERNAL), receive, send, recorded=not internal)
        except GarrisonError as error:
            await send_json(send, _status(error), {"error": error.message, "code": error.code})
        except ClientGoneError:
            return

    async def _answer(self, method: str, path: str, receive: Receive, send: Send, *, recorded: bool) -> None:
        match method, path:
            case "GET", "/health":
                health = {"status": "ok", "model": f"{self._name}:{self._version}"}
                await send_json(send, 200, {**health, "active": self._active, "queued": 0, "requests": self._done})
                return
            case "GET", "/v2":
                server = {"name": "garrison-worker", "version": onnxruntime.__version__, "extensions": []}
                await send_json(send, 200, server)
                return
            case "GET", "/v2/health/live":
                await send_json(send, 200, {"live": True})
                return
            case "GET", "/v2/health/ready":
                await send_json(send, 200, {"ready": True})
                return
        parsed = _Path.parse(path)
        if parsed is None:
            raise NotFoundError("oip.unknown_path", f"a tensor model's worker has no {path}")
        if parsed.version not in (None, self._version):
            raise NotFoundError(
                "oip.version_unknown", f"{self._name} is served in version {self._version}, not {parsed.version}"
            )
        match method, parsed.verb:
            case "GET", "":
                await send_json(send, 200, self._metadata())
            case "GET", "ready":
                await send_json(send, 200, {"name": self._name, "ready": True})
            case "POST", "infer":
                await self._infer(receive, send, recorded=recorded)
            case _:
                raise NotFoundError("oip.unknown_path", f"a tensor model's worker has no {method} {path}")

    def _metadata(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "versions": [self._version],
            "platform": "onnxruntime_onnx",
            "inputs": [spec.to_dict() for spec in self._session.inputs],
            "outputs": [spec.to_dict() for spec in self._session.outputs],
        }

    async def _infer(self, receive: Receive, send: Send, *, recorded: bool) -> None:
        began = time.monotonic()
        error: GarrisonError | None = None
        self._active += 1
        try:
            request, outputs = await self._run(await _body(receive))
            identity = {} if request.id is None else {"id": request.id}
            model = {"model_name": self._name, "model_version": self._version}
            await send_json(send, 200, {**model, **identity, "outputs": outputs})
        except GarrisonError as caught:
            error = caught
            raise
        finally:
            self._active -= 1
            self._done += 1
            if recorded:
                self._record(
                    RequestRecord(
                        "infer",
                        ok=error is None,
                        error_code=None if error is None else error.code,
                        duration_ms=round((time.monotonic() - began) * 1000, 3),
                        status=200 if error is None else _status(error),
                    )
                )

    async def _run(self, body: bytes) -> tuple[InferRequest, list[dict[str, Any]]]:
        """Parse, run, and encode in the session's thread: large tensors must not hold up the event loop."""

        def work() -> tuple[InferRequest, list[dict[str, Any]]]:
            request = parse_infer(body, self._session.inputs, self._session.outputs)
            return request, encode_outputs(self._session.run(request), self._datatypes)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


async def _body(receive: Receive) -> bytes:
    try:
        return await read_body(receive)
    except BodyTooLargeError:
        raise InvalidError("oip.body_too_large", "the request is longer than 16 MiB") from None


def _status(error: GarrisonError) -> int:
    """Return the HTTP status; the protocol knows 400 for what a client got wrong."""
    if error.code == "oip.body_too_large":
        return 413
    if isinstance(error, InvalidError):
        return 400
    return error.http_status if isinstance(error, NotFoundError) else 500
