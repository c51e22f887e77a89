from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.runtimes.workers import WatchedWorker, llama_spec, magika_model, onnx_spec, smollm2


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a short path: that of a unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="garrison-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def llama(short_folder: Path) -> Iterator[WatchedWorker]:
    """One SmolLM2 worker for a module: what the cache holds where decides the rounding, and so a word."""
    with WatchedWorker(llama_spec(smollm2(), short_folder / "llama.sock")) as worker:
        worker.ready()
        yield worker


@pytest.fixture(scope="session")
def node() -> Path:
    """The Node that the tests' environment brings, with its clients installed (``scripts/node.sh``)."""
    program = Path(sys.executable).with_name("node")
    installed = Path(__file__).resolve().parents[2] / "node" / "node_modules" / "openai"
    assert program.exists(), "run: make setup"
    assert installed.exists(), "run: scripts/node.sh"
    return program


@pytest.fixture(scope="session")
def magika_worker(short_folder: Path) -> Iterator[WatchedWorker]:
    """One Magika worker for all tests that leave it as they found it."""
    with WatchedWorker(onnx_spec(magika_model(), short_folder / "magika.sock")) as worker:
        worker.ready()
        yield worker
