"""A worker's life: what it needs to begin, and every way in which it ends."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from garrison_agent.runtimes.process import Exited, Failed, Ready, Verified
from tests.integration.runtimes.workers import (
    DEADLINE_S,
    WatchedWorker,
    eventually,
    llama_spec,
    magika_model,
    onnx_spec,
    smollm2,
    worker_file,
)

pytestmark = pytest.mark.integration

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def tripwire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a path that appears as soon as a worker imports a native library."""
    mark = tmp_path / "imported"
    for package in ("llama_cpp", "onnxruntime"):
        module = tmp_path / "tripwire" / package / "__init__.py"
        module.parent.mkdir(parents=True)
        module.write_text(f"open({str(mark)!r}, 'w').close()\nraise ImportError('tripwire')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tripwire"))
    return mark


def flip_a_byte(path: Path, at: int) -> None:
    """Change one byte and nothing that ``stat`` shows."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_byte_is_refused_before_anything_native_is_imported(
    tmp_path: Path, short_folder: Path, tripwire: Path
) -> None:
    model = tmp_path / "model.gguf"
    shutil.copyfile(smollm2(), model)
    spec = llama_spec(model, short_folder / "w.sock")
    flip_a_byte(model, 70_000_000)
    with WatchedWorker(spec) as worker:
        failed = worker.failed()
    assert failed.code == "model.digest_mismatch"
    assert "model.gguf" in failed.message
    assert not tripwire.exists()
    assert not any(isinstance(event, Verified | Ready) for event in worker.events)


@pytest.mark.parametrize("spec_of", [llama_spec, onnx_spec])
def test_an_engine_that_cannot_be_imported_is_said_to_be_missing(
    spec_of: object, short_folder: Path, tripwire: Path
) -> None:
    assert callable(spec_of)
    with WatchedWorker(spec_of(magika_model(), short_folder / "w.sock")) as worker:
        failed = worker.failed()
    assert failed.code == "engine.unavailable"
    assert tripwire.exists()
    assert any(isinstance(event, Verified) for event in worker.events)


def test_a_file_of_another_size_is_refused(tmp_path: Path, short_folder: Path) -> None:
    model = tmp_path / "model.onnx"
    shutil.copyfile(magika_model(), model)
    spec = onnx_spec(model, short_folder / "w.sock")
    os.truncate(model, 1000)
    with WatchedWorker(spec) as worker:
        assert worker.failed().code == "model.digest_mismatch"


def test_a_missing_file_is_an_event_and_an_end(tmp_path: Path, short_folder: Path) -> None:
    model = tmp_path / "model.onnx"
    shutil.copyfile(magika_model(), model)
    spec = onnx_spec(model, short_folder / "w.sock")
    model.unlink()
    with WatchedWorker(spec) as worker:
        failed = worker.failed()
    assert failed.code == "model.file_missing"
    assert worker.events[-1] == Exited(None)


@pytest.mark.parametrize("keep", [0, 1000, 50_000_000])
def test_a_truncated_gguf_that_was_signed_so_fails_to_load(keep: int, tmp_path: Path, short_folder: Path) -> None:
    model = tmp_path / "model.gguf"
    with smollm2().open("rb") as whole:
        model.write_bytes(whole.read(keep))
    with WatchedWorker(llama_spec(model, short_folder / "w.sock")) as worker:
        assert worker.failed().code == "model.load_failed"


def test_a_file_that_is_no_onnx_fails_to_load(tmp_path: Path, short_folder: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"not a model" * 100)
    with WatchedWorker(onnx_spec(model, short_folder / "w.sock")) as worker:
        failed = worker.failed()
    assert failed.code == "model.load_failed"


def test_a_socket_that_cannot_be_bound_is_a_failure(tmp_path: Path) -> None:
    with WatchedWorker(onnx_spec(magika_model(), tmp_path / ("x" * 120) / "w.sock")) as worker:
        assert worker.failed().code == "worker.socket_failed"


def test_the_bytes_loaded_are_those_that_were_open_at_the_start(tmp_path: Path, short_folder: Path) -> None:
    """Replacing the path afterwards, as a repair does, changes nothing for the worker."""
    model = tmp_path / "model.onnx"
    shutil.copyfile(magika_model(), model)
    with WatchedWorker(onnx_spec(model, short_folder / "w.sock")) as worker:
        model.unlink()
        model.write_bytes(b"something else")
        worker.ready()


def test_only_its_own_user_may_open_the_socket(magika_worker: WatchedWorker) -> None:
    mode = magika_worker.spec.socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_ready_tells_time_memory_and_what_the_model_is(llama: WatchedWorker) -> None:
    ready = llama.ready()
    assert llama.expect(Verified).hash_ms > 0
    assert ready.load_ms > 0
    assert 100 < ready.rss_mb < 1000
    assert ready.metadata["engine"] == "llama.cpp"
    assert ready.metadata["context_length"] == 2048
    assert ready.metadata["chat_template"] is True


def test_stop_lets_a_running_request_finish(short_folder: Path) -> None:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock")) as worker:
        worker.ready()
        connection, response = worker.stream("/v1/completions", {**ENDLESS, "max_tokens": 40})
        response.readline()
        worker.worker.stop(grace_s=DEADLINE_S)
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        assert worker.expect(Exited) == Exited(0)
        assert worker.record().completion_tokens == 40
    assert not worker.spec.socket.exists()
    assert worker.worker.pid is None


def test_stop_kills_what_does_not_end_in_time(short_folder: Path) -> None:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock")) as worker:
        worker.ready()
        connection, response = worker.stream("/v1/completions", ENDLESS)
        response.readline()
        worker.worker.stop(grace_s=0.2)
        assert worker.expect(Exited) == Exited(-signal.SIGKILL)
        connection.close()


def test_a_worker_killed_while_it_generates_is_reported(short_folder: Path) -> None:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock")) as worker:
        worker.ready()
        connection, response = worker.stream("/v1/completions", ENDLESS)
        response.readline()
        pid = worker.worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        end = worker.expect(Exited)
        assert (end.returncode, end.code) == (-signal.SIGKILL, "model.crashed")
        assert "killed from outside" in end.message
        connection.close()
    assert not any(isinstance(event, Failed) for event in worker.events)
    assert not worker.spec.socket.exists()


def test_a_worker_killed_while_it_loads_has_failed_to_load(short_folder: Path) -> None:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock")) as worker:
        pid = worker.worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        failed = worker.failed()
    assert failed.code == "model.load_failed"
    assert "signal 9" in failed.message


def test_no_worker_outlives_a_killed_agent(short_folder: Path) -> None:
    """A stand-in agent starts a worker and is killed; the end of its pipe ends the worker."""
    file = worker_file(magika_model(), "model.onnx")
    agent = textwrap.dedent(
        f"""
        from pathlib import Path
        import threading
        from garrison_agent.runtimes.process import Ready, Worker
        from garrison_agent.runtimes.spec import WorkerFile, WorkerSpec
        from garrison_protocol.states import Engine

        file = WorkerFile("model.onnx", {file.sha256!r}, {file.size}, Path({str(file.disk_path)!r}))
        socket = Path({str(short_folder / "orphan.sock")!r})
        spec = WorkerSpec("m:1", Engine.ONNXRUNTIME, (file,), socket, 1, 1, 1, {{}})
        ready = threading.Event()
        worker = Worker(spec, lambda event: ready.set() if isinstance(event, Ready) else None)
        worker.start()
        ready.wait()
        print(worker.pid, flush=True)
        threading.Event().wait()
        """
    )
    with subprocess.Popen([sys.executable, "-c", agent], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            assert is_running(pid)
        finally:
            process.kill()
    eventually(lambda: not is_running(pid), "the worker ends")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
