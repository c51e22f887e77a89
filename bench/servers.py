"""The servers that a board's own is measured against, each with the same model file and the same threads."""

from __future__ import annotations

import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.amx import has_amx
from demo.packages import smollm2_file
from demo.processes import Process, free_port, wait_for

CONTEXT_LENGTH = 2048
"""Of one answer."""


@dataclass(frozen=True)
class Server:
    """One that listens on a port of loopback."""

    name: str
    port: int


@contextmanager
def python_server(folder: Path, *, threads: int) -> Iterator[Server]:
    """Give llama-cpp-python's server, which answers one request at a time.

    ``--interrupt_requests false``: by default it would break off a running answer as soon as another is asked for.

    Raises:
        StepError: It did not start.
    """
    words = ["-m", "bench.llama_python_server", "--model", str(smollm2_file()), "--n_ctx", str(CONTEXT_LENGTH)]
    words += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "false"]
    # Its default keeps the scores of every position, 100 kB a token; off is how a careful user runs it.
    words += ["--logits_all", "false"]
    with _running("llama-cpp-python's server", [sys.executable, *words], folder) as server:
        yield server


@contextmanager
def llama_server(folder: Path, *, threads: int, parallel: int) -> Iterator[Server | None]:
    """Give llama.cpp's own server, if ``GARRISON_LLAMA_SERVER`` or PATH has one; None: it is not at hand.

    Raises:
        StepError: It did not start.
    """
    program = os.environ.get("GARRISON_LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        yield None
        return
    words = ["--model", str(smollm2_file()), "--ctx-size", str(CONTEXT_LENGTH * parallel), "--parallel", str(parallel)]
    words += ["--threads", str(threads), "--threads-batch", str(threads), "--kv-unified"]
    words += ["--no-repack"] if has_amx() else []
    with _running("llama-server", [program, *words], folder) as server:
        yield server


@contextmanager
def _running(name: str, command: Sequence[str], folder: Path) -> Iterator[Server]:
    port = free_port()
    log = folder / f"{name.replace(' ', '-')}.log"
    process = Process(name, [*command, "--host", "127.0.0.1", "--port", str(port)], log)
    process.start()
    try:
        wait_for(name, lambda: _answers(port), timeout_s=120, log=log, alive=[process])
        yield Server(name, port)
    finally:
        process.stop()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False
