"""What passing a token through costs the agent, with a metronome in the place of the model.

The agent's own server, in a process of its own, relays answers of a worker that computes nothing: so many streams,
100 steps a second, one token a step. Its CPU time is divided by the tokens that came through.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bench.result import Budget, Findings, Measure
from bench.streams import stream
from demo.processes import StepError, free_port

STREAMS = 4
TOKENS = 600
ROUNDS = 7
STEPS_PER_S = 100
FLUSH_STEPS = 3
"""A worker sends what 30 ms brought; at 100 steps a second, three tokens in one event."""
ALIAS = "metronome"


def measure(folder: Path) -> Findings:
    """Return microseconds of CPU per token; takes about two minutes.

    Raises:
        StepError: The relay did not start.
    """
    folder.mkdir(parents=True)
    measures = []
    for what, flush in ((f"{STREAMS} streams, as a worker flushes", FLUSH_STEPS), (f"{STREAMS} streams, per token", 1)):
        with _relay(folder, flush) as (port, pid):
            found = [_cost_us(port, pid) for _ in range(ROUNDS + 1)][1:]
        budget = Budget("≤ 150 µs", 150, at_least=False, of_ratio=False)
        measures.append(Measure(what, statistics.median(found), "µs/token", budget=budget, samples=tuple(found)))
    return Findings(
        f"{STREAMS} streams of {TOKENS} tokens at {STEPS_PER_S} steps a second, from a worker that computes nothing,"
        " through the agent's server on loopback TCP to clients of nothing but a socket; user and system time of the"
        f" agent's server per token, from schedstat of its threads; median of {ROUNDS} rounds after one to warm up."
        " As a worker flushes: at once, then at most every 30 ms, so three tokens share an event",
        tuple(measures),
    )


def _cost_us(port: int, pid: int) -> float:
    body = {"model": ALIAS, "prompt": "", "max_tokens": TOKENS}
    before_s = _ran_s(pid)
    with ThreadPoolExecutor(STREAMS) as clients:
        answers = list(clients.map(lambda _: stream(port, "/v1/completions", body), range(STREAMS)))
    tokens = sum(len(answer.text.split()) for answer in answers)
    if tokens != STREAMS * TOKENS:
        raise StepError(f"{tokens} of {STREAMS * TOKENS} tokens came through")
    return 1e6 * (_ran_s(pid) - before_s) / tokens


def _ran_s(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def _relay(folder: Path, flush: int) -> Iterator[tuple[int, int]]:
    """Give the port and the process id of a relay in front of a metronome."""
    port = free_port()
    worker, agent = folder / f"worker-{flush}.sock", folder / f"agent-{flush}.sock"
    words = [[sys.executable, "-m", "bench.metronome", str(worker), str(flush), str(STEPS_PER_S)]]
    words += [[sys.executable, "-m", "bench.relay_process", ALIAS, str(worker), str(agent), str(port)]]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for one in words:
            child = subprocess.Popen(one, stdout=subprocess.PIPE, env={**os.environ})
            running.append(child)
            assert child.stdout is not None
            if child.stdout.readline() != b"ready\n":
                raise StepError(f"{one[2]} did not start")
        yield port, running[1].pid
    finally:
        for child in running:
            child.terminate()
            child.wait(30)
            if child.stdout is not None:
                child.stdout.close()
