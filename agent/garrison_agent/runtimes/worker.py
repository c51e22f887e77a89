"""The worker process: ``python -m garrison_agent.runtimes.worker``, started by ``process.Worker`` only.

Standard input: one line with the order, then nothing; its end ends the worker, so no agent leaves orphans behind.
Status pipe: ``verified``, then ``ready`` or ``failed``, then one line per request. Exit status: 0 ended as asked,
3 failed and said why, 70 a bug.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
import time
import traceback
from typing import Protocol, cast

from garrison_agent.runtimes import limits
from garrison_agent.runtimes.asgi import Application
from garrison_agent.runtimes.process import resident_mb
from garrison_agent.runtimes.spec import WorkerOrder, decode_order
from garrison_agent.runtimes.status import Failed, Ready, RequestDone, RequestRecord, StatusWriter, Verified
from garrison_agent.runtimes.verify import verify_files
from garrison_protocol.errors import GarrisonError, UnavailableError
from garrison_protocol.states import Engine

EXIT_FAILED = 3
EXIT_BUG = 70

_ENGINES = {
    Engine.LLAMA_CPP: ("garrison_agent.runtimes.llama.engine", "llama"),
    Engine.ONNXRUNTIME: ("garrison_agent.runtimes.tensors.engine", "onnx"),
}
"""Engine -> (module, extra that installs what it needs)."""


class Load(Protocol):
    """The one function of an engine's module."""

    async def __call__(self, order: WorkerOrder, record: RecordRequest) -> tuple[Application, dict[str, object]]:
        """Load the model; return the application that serves it, and its facts."""


class RecordRequest(Protocol):
    """Where an engine reports a finished request."""

    def __call__(self, record: RequestRecord, /) -> None:
        """Report one request."""


def main() -> int:
    """Run one worker to its end; return the exit status."""
    order = decode_order(_read_line(0))
    limits.apply(order.limits, order.group)
    threading.Thread(target=_end_with_parent, daemon=True, name="stdin").start()
    status = StatusWriter(order.status_descriptor)
    try:
        began = time.monotonic()
        verify_files(order.files)
        status.send(Verified(_ms_since(began)))
        asyncio.run(_run(order, status))
    except GarrisonError as error:
        status.send(Failed(error.code, error.message))
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_FAILED  # the agent is gone
    return 0


async def _run(order: WorkerOrder, status: StatusWriter) -> None:
    from garrison_agent.runtimes.serving import serve

    began = time.monotonic()
    load = _engine(order.engine)

    def record(done: RequestRecord) -> None:
        status.send(RequestDone(done))

    application, facts = await load(order, record)
    load_ms = _ms_since(began)

    def listening() -> None:
        limits.forget_peak()
        status.send(Ready(load_ms, round(resident_mb("self") or 0.0, 1), {"engine": order.engine.value, **facts}))

    try:
        await serve(application, order.socket, listening)
    except OSError as error:
        raise UnavailableError(
            "worker.socket_failed",
            f"the worker cannot listen on {order.socket}: {error.strerror or error}",
            hint="check runtime_dir in agent.toml; a unix socket's path has at most 107 bytes",
        ) from error


def _engine(engine: Engine) -> Load:
    """Import an engine, and with it its native library.

    Raises:
        UnavailableError: ``engine.unavailable``: it is not installed, or does not run on this machine.
    """
    module, extra = _ENGINES[engine]
    try:
        return cast("Load", importlib.import_module(module).load)
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(
            "engine.unavailable",
            f"{engine.value} cannot be imported: {error}",
            hint=f"install garrison[{extra}] for this machine",
        ) from error


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _read_line(descriptor: int) -> bytes:
    """Read up to the first newline. Unbuffered: the thread that waits for the end reads on from here."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(descriptor, 65536)
        if not part:
            os._exit(0)  # the parent died before it said what to do
        line += part
    return line


def _ms_since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)


if __name__ == "__main__":
    code = EXIT_BUG
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        # No interpreter shutdown: native threads may be in the middle of a decode, and the kernel frees everything.
        os._exit(code)
