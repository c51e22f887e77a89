"""Workers cannot take the board down: they are bounded, a hung one can be told and ended, and nothing of them stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from garrison_agent.runtimes.gate import read_health
from garrison_agent.runtimes.process import Exited, peak_mb, resident_mb
from garrison_agent.runtimes.spec import Limits
from tests.integration.runtimes.workers import WatchedWorker, eventually, llama_spec, smollm2

pytestmark = pytest.mark.integration


def group_mb(group: int) -> dict[int, float]:
    """Return the resident memory of each process of a process group, in MiB."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group:
                found[int(entry.name)] = resident_mb(entry.name) or 0.0
    return found


def test_unloading_returns_all_memory(short_folder: Path) -> None:
    own_before = resident_mb("self")
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock", limits=Limits(memory_mb=600))) as worker:
        ready = worker.ready()
        worker.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})
        pid = worker.worker.pid
        assert pid is not None
        taken = group_mb(pid)
        assert sum(taken.values()) > 200
        assert ready.metadata["kv_bytes_per_token"] == 30 * 3 * (64 + 64) * 2
        peak = worker.worker.peak_mb()
        assert peak is not None
        assert peak_mb(pid) is not None
        assert ready.rss_mb <= peak < 600
        worker.worker.stop()
        worker.expect(Exited)
    eventually(lambda: group_mb(pid) == {}, "no process of the worker's group is left")
    own_after = resident_mb("self")
    assert own_before is not None
    assert own_after is not None
    assert own_after < own_before + 20  # nothing of the model is in the process that started it


def test_a_worker_that_wants_far_too_much_ends_alone(short_folder: Path) -> None:
    spec = llama_spec(smollm2(), short_folder / "w.sock", parallel=32, limits=Limits(memory_mb=64))
    with WatchedWorker(spec) as worker:  # its keys and values alone would take 1.4 GiB
        assert worker.failed().code == "model.load_failed"


def test_a_hung_worker_says_nothing_and_is_ended_for_that(short_folder: Path) -> None:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "w.sock")) as worker:
        worker.ready()
        health = read_health(worker.spec.socket, 10.0)
        assert health is not None
        assert {"active", "queued", "steps"} <= set(health)
        pid = worker.worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        assert read_health(worker.spec.socket, 0.2) is None
        worker.worker.kill_stalled("its worker did not get on")
        assert worker.expect(Exited) == Exited(-signal.SIGKILL, "worker.stalled", "its worker did not get on")


def test_reading_a_prompt_is_progress_too(llama: WatchedWorker) -> None:
    before = llama.health()["steps"]
    llama.post("/v1/completions", {"prompt": "one two three " * 300, "max_tokens": 1})
    assert llama.health()["steps"] >= before + 2
