"""The ONNX Runtime engine of a worker: one session, served over the Open Inference Protocol.

Importing this loads the native library; the worker does so only after it has verified the files. Source: Open
Inference Protocol, "HTTP/REST"; Triton Inference Server, "Binary Tensor Data Extension".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from garrison_agent.runtimes.asgi import (
    Application,
    BodyTooLargeError,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    on_disconnect,
    read_body,
    send_json,
)
from garrison_agent.runtimes.spec import WorkerOrder
from garrison_agent.runtimes.status import MAX_APP, RequestRecord
from garrison_agent.runtimes.tensors.oip import (
    EXTENSIONS,
    HEADER_LENGTH,
    EncodedAnswer,
    InferRequest,
    check_rows,
    encode_answer,
    parse_header_length,
    parse_infer,
)
from garrison_agent.runtimes.tensors.runs import Job, Runner, Sharing
from garrison_agent.runtimes.tensors.session import Session, onnxruntime, read_settings
from garrison_agent.runtimes.tensors.sharing import measure
from garrison_agent.runtimes.tensors.tensor import Array
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError, UnavailableError

INTERNAL = "/internal"
_LARGE_BYTES = 256 * 1024
"""Longer requests and answers are read and written in a thread: they would hold up the event loop."""
_RETRY_AFTER = (b"retry-after", b"1")
_CLIENT_LEFT = 499
_STATUS = {"oip.body_too_large": 413, "inference.deadline_exceeded": 504, "inference.queue_full": 503}

T = TypeVar("T")


async def load(order: WorkerOrder, record: Callable[[RequestRecord], None]) -> tuple[Application, dict[str, Any]]:
    """Return the application that serves the model, and the model's facts.

    Raises:
        InvalidError: ``model.load_failed`` or ``manifest.malformed``.
        UnavailableError: ``model.provider_unavailable``.
    """
    settings = read_settings(order.settings)

    def prepare() -> tuple[Session, Sharing]:
        session = Session(order.files[0].native_path, order.threads, settings, order.execution_provider)
        off = Sharing(1, "model_settings switch it off")
        return session, measure(session) if settings.batching else off

    session, sharing = await asyncio.to_thread(prepare)
    facts = {
        "inputs": [spec.to_dict() for spec in session.inputs],
        "outputs": [spec.to_dict() for spec in session.outputs],
        "providers": list(session.providers.running),
        "providers_missing": dict(session.providers.missing),
        "batching": sharing.to_dict(),
    }
    runner = Runner(session, sharing)
    limits = Limits(settings.request_timeout_s, settings.max_rows)
    return OipApi(order.name, order.version, session, runner, record=record, limits=limits), facts


@dataclass(frozen=True)
class Limits:
    """Of one request: seconds, and rows of a first dimension that may have any size."""

    timeout_s: float
    rows: int


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
        runner: Runner,
        *,
        record: Callable[[RequestRecord], None],
        limits: Limits,
    ) -> None:
        self._name = name
        self._version = version
        self._session = session
        self._runner = runner
        self._record = record
        self._limits = limits
        self._datatypes = {spec.name: spec.datatype for spec in session.outputs}
        self._done = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            await self._answer(scope, receive, send)
        except GarrisonError as error:
            headers = (_RETRY_AFTER,) if error.retryable else ()
            hint = f" ({error.hint})" if error.hint else ""
            await send_json(send, _status(error), {"error": f"{error.message}{hint}", "code": error.code}, headers)
        except ClientGoneError:
            return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method: str = scope["method"]
        path = scope["path"].removeprefix(INTERNAL)
        match method, path:
            case "GET", "/health":
                await send_json(send, 200, self._health())
                return
            case "GET", "/v2":
                server = {"name": "garrison-worker", "version": onnxruntime.__version__}
                await send_json(send, 200, {**server, "extensions": list(EXTENSIONS)})
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
                await self._infer(scope, receive, send)
            case _:
                raise NotFoundError("oip.unknown_path", f"a tensor model's worker has no {method} {path}")

    def _health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "model": f"{self._name}:{self._version}",
            "active": self._runner.active,
            "step_timeout_s": self._limits.timeout_s,
            "queued": self._runner.waiting,
            "requests": self._done,
            "runs": self._runner.runs,
            "batching": self._runner.sharing.to_dict(),
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "versions": [self._version],
            "platform": "onnxruntime_onnx",
            "inputs": [spec.to_dict() for spec in self._session.inputs],
            "outputs": [spec.to_dict() for spec in self._session.outputs],
        }

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        status, code = 200, None
        try:
            answer = await self._run(scope, receive)
            await _send(send, answer)
        except GarrisonError as error:
            status, code = _status(error), error.code
            raise
        except ClientGoneError:
            status, code = _CLIENT_LEFT, "inference.client_disconnected"
            raise
        finally:
            self._done += 1
            if not scope["path"].startswith(INTERNAL + "/"):
                duration_ms = round((time.monotonic() - began) * 1000, 3)
                app = _app(scope)
                self._record(
                    RequestRecord(
                        "infer", ok=code is None, error_code=code, duration_ms=duration_ms, status=status, app=app
                    )
                )

    async def _run(self, scope: Scope, receive: Receive) -> EncodedAnswer:
        timeout_s = self._time_left(scope)
        body = await _body(receive)  # before anything is refused: the agent is still writing it
        length = _header(scope, HEADER_LENGTH)
        header_length = None if length is None else parse_header_length(length)

        def parse() -> InferRequest:
            return parse_infer(body, self._session.inputs, self._session.outputs, header_length)

        request = await _beside(len(body), parse)
        check_rows(request.inputs, self._session.inputs, self._limits.rows)
        job = self._runner.submit(request.inputs, request.outputs, _app(scope))
        arrays = await self._wait(job, receive, timeout_s)
        head = {"model_name": self._name, "model_version": self._version}
        if request.id is not None:
            head["id"] = request.id

        def encode() -> EncodedAnswer:
            return encode_answer(head, arrays, self._datatypes, request.binary)

        return await _beside(sum(array.nbytes for array in arrays.values()), encode)

    async def _wait(self, job: Job, receive: Receive, timeout_s: float) -> dict[str, Array]:
        """Return the job's outputs; its run is stopped when its client leaves or its time is over."""
        answer = asyncio.wrap_future(job.answer)

        def leave() -> None:
            self._runner.give_up(job)
            answer.cancel()

        async with on_disconnect(receive, leave):
            done, _ = await asyncio.wait({answer}, timeout=timeout_s)
            if not done:
                leave()
                raise UnavailableError(
                    "inference.deadline_exceeded",
                    f"there was no answer within {timeout_s:g} s",
                    hint="the model is busy, or slow with these inputs",
                )
        if answer.cancelled():
            raise ClientGoneError
        return answer.result()

    def _time_left(self, scope: Scope) -> float:
        """Return the seconds that the request may take: what its client allows, at most what the model's are worth."""
        stated = _header(scope, b"x-garrison-timeout-ms")
        return (
            min(self._limits.timeout_s, int(stated) / 1000) if stated and stated.isdecimal() else self._limits.timeout_s
        )


async def _beside(size: int, work: Callable[[], T]) -> T:
    """Do ``work`` on ``size`` bytes: at once, or beside the event loop where there are many."""
    return work() if size <= _LARGE_BYTES else await asyncio.to_thread(work)


async def _body(receive: Receive) -> bytes:
    try:
        return await read_body(receive)
    except BodyTooLargeError:
        raise InvalidError("oip.body_too_large", "the request is longer than 16 MiB") from None


async def _send(send: Send, answer: EncodedAnswer) -> None:
    kind = b"application/json"
    headers = [(b"content-length", str(len(answer.body)).encode())]
    if answer.header_length is not None:
        kind = b"application/octet-stream"
        headers.append((HEADER_LENGTH, str(answer.header_length).encode()))
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind), *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": answer.body})


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _app(scope: Scope) -> str:
    return (_header(scope, b"x-garrison-app") or "")[:MAX_APP]


def _status(error: GarrisonError) -> int:
    """Return the HTTP status; the protocol knows 400 for what a client got wrong."""
    if error.code in _STATUS:
        return _STATUS[error.code]
    if isinstance(error, InvalidError):
        return 400
    return error.http_status if isinstance(error, NotFoundError) else 500
