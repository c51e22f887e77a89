"""What a loaded model costs a board beyond its weights, how long loading takes, and what unloading gives back."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from bench.result import Findings, Measure
from bench.serving import TEXT, serving_board, worker_pids
from bench.streams import side_by_side
from demo.fleet import Board
from demo.packages import smollm2_file

LOADS = 5
STREAMS = 4
_MB = 1e6


def measure(folder: Path) -> Findings:
    """Return memory in MB and seconds; takes about two minutes.

    Raises:
        StepError: The board did not come into service.
    """
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    with serving_board(folder, TEXT, threads=threads, parallel=STREAMS) as board:
        board.run("model", "unload", TEXT)
        unloaded_mb = _resident(board.agent.pid)["Rss"]
        available_mb = _available_mb()
        board.run("model", "load", TEXT)
        bodies = [
            {"model": TEXT, "prompt": f"{n}. Once upon a time", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
            for n in range(STREAMS)
        ]
        side_by_side(board.port, "/v1/completions", bodies)
        (pid,) = worker_pids(board)
        worker = _resident_with_children(pid)
        agent = _resident(board.agent.pid)
        board.run("model", "unload", TEXT)
        again_mb = _resident(board.agent.pid)["Rss"]
        left_mb = available_mb - _available_mb()
        warm_s = [_load_s(board, cold=False) for _ in range(LOADS)]
        cold_s = [_load_s(board, cold=True) for _ in range(LOADS)]
    weights_mb = smollm2_file().stat().st_size / _MB
    both_mb = worker["Rss"] + agent["Rss"]
    return Findings(
        f"SmolLM2-135M Q4_1 ({weights_mb:.0f} MB, mapped), {STREAMS} x 2,048 tokens of context, after {STREAMS} streams"
        " of 200 tokens; RSS of the agent, the worker, and the worker's template process; their anonymous part is what"
        " a board really loses, since mapped weights are the page cache's; load = `garrison-agent model load`, start of"
        " the command included, hashing every byte first; cold: the model's pages were dropped before"
        " (POSIX_FADV_DONTNEED)",
        (
            Measure("agent + worker RSS", both_mb, "MB", weights_mb, "weights", both_mb / weights_mb),
            Measure("RSS beyond the weights", both_mb - weights_mb, "MB"),
            Measure("worker, anonymous", worker["Anonymous"], "MB"),
            Measure("agent after an unload", again_mb, "MB", unloaded_mb, "before the load", again_mb / unloaded_mb),
            Measure("memory of the machine not returned by an unload", left_mb, "MB"),
            Measure("load, warm", statistics.median(warm_s), "s", samples=tuple(warm_s)),
            Measure("load, cold", statistics.median(cold_s), "s", samples=tuple(cold_s)),
        ),
    )


def _resident(pid: int) -> dict[str, float]:
    """Return the fields of ``smaps_rollup`` in MB."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name.rstrip(":")] = int(value) * 1024 / _MB
    return fields


def _resident_with_children(pid: int) -> dict[str, float]:
    """Return the sums of ``_resident`` over a process and those that it has started."""
    children = [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]
    processes = [_resident(one) for one in (pid, *children)]
    return {name: sum(one[name] for one in processes) for name in processes[0]}


def _available_mb() -> float:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 / _MB


def _load_s(board: Board, *, cold: bool) -> float:
    if cold:
        for blob in (board.state / "blobs").rglob("*"):
            if blob.is_file():
                with blob.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began_s = time.perf_counter()
    board.run("model", "load", TEXT)
    took_s = time.perf_counter() - began_s
    board.run("model", "unload", TEXT)
    return took_s
