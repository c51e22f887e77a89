"""What an idle agent costs a board: memory, CPU, and the time until it serves.

A real enrolled agent without a model, connected to a real broker over mutual TLS, with default intervals.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.fleet import one_board
from bench.result import Budget, Findings, Measure
from demo.fleet import BIN, Board
from demo.processes import Process, StepError, wait_for

STARTS = 9
SETTLE_S = 45.0
"""Past the first connection's work: metadata, the first status, malloc's high tide."""
CPU_S = 60.0
"""One telemetry sample and one heartbeat fall into any such stretch."""
_MB = 1e6
_BARE = "import time; time.sleep(3600)"
_UNTIL_STARTED = "import os, sys; os.write(1, b'.'); sys.stdin.read()"


def measure(folder: Path) -> Findings:
    """Return the footprint; takes about three minutes.

    Raises:
        StepError: A process did not start, or the agent did not connect.
    """
    with one_board(folder) as (fleet, board):
        notifier = Notifier(folder / "notify.sock")
        board.agent = Process(
            f"agent {board.name}",
            [str(BIN / "garrison-agent"), "run", "--config", str(board.config)],
            board.log,
            {"NOTIFY_SOCKET": str(notifier.path)},
        )
        ready_s, bare_s = [], []
        for number in range(STARTS + 1):
            bare, ready = _start_bare(), _start(board, notifier)
            if number:  # the first start also compiles and reads from the disk
                bare_s.append(bare)
                ready_s.append(ready)
            if number < STARTS:
                board.agent.stop()
        wait_for(
            "the agent's connection",
            lambda: bool(board.status()["connected"]),
            timeout_s=60,
            log=board.log,
            alive=[board.agent],
        )
        time.sleep(SETTLE_S)
        pid = board.agent.pid
        ticks_s, ran_s, began_s = _cpu_s(pid), _ran_s(pid), time.monotonic()
        time.sleep(CPU_S)
        elapsed_s = time.monotonic() - began_s
        cpu_percent = 100 * (_cpu_s(pid) - ticks_s) / elapsed_s
        ran_percent = 100 * (_ran_s(pid) - ran_s) / elapsed_s
        rss_mb, pss_mb = _memory_mb(pid)
        children = _children(pid)
        if children or not board.status()["connected"]:
            raise StepError(f"the agent was not idle and online: children {children}", board.log)
        fleet.broker.require()
    bare_rss_mb, bare_pss_mb = _bare_memory_mb()
    return Findings(
        f"agent enrolled, online over mutual TLS, no model, default intervals; memory after {SETTLE_S + CPU_S:.0f} s;"
        f" CPU (user and system, ended children included) over {CPU_S:.0f} s; ready = fork to READY=1, which follows"
        f" the local API's listen, median of {STARTS} starts after one to warm up, each after one of a bare"
        " interpreter; ratio = agent / bare interpreter",
        (
            Measure(
                "RSS",
                rss_mb,
                "MB",
                bare_rss_mb,
                "bare Python",
                rss_mb / bare_rss_mb,
                Budget("RSS ≤ 60 MB", 60, at_least=False, of_ratio=False),
            ),
            Measure("PSS", pss_mb, "MB", bare_pss_mb, "bare Python", pss_mb / bare_pss_mb),
            Measure(
                "CPU", cpu_percent, "% of a core", budget=Budget("CPU < 0.5 %", 0.499, at_least=False, of_ratio=False)
            ),
            Measure("CPU, schedstat", ran_percent, "% of a core"),
            Measure(
                "ready",
                statistics.median(ready_s),
                "s",
                statistics.median(bare_s),
                "bare Python",
                statistics.median(ready_s) / statistics.median(bare_s),
                Budget("ready < 2 s", 1.999, at_least=False, of_ratio=False),
                tuple(ready_s),
            ),
        ),
    )


class Notifier:
    """The socket on which systemd would hear sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(path))

    def drain(self) -> None:
        """Forget what came so far."""
        self._socket.setblocking(False)
        try:
            while self._socket.recv(4096):
                pass
        except BlockingIOError:
            pass

    def await_ready(self, timeout_s: float) -> None:
        """Return when READY=1 comes.

        Raises:
            TimeoutError: It did not.
        """
        self._socket.settimeout(timeout_s)
        while b"READY=1" not in self._socket.recv(4096).split(b"\n"):
            pass


def _start(board: Board, notifier: Notifier) -> float:
    notifier.drain()
    began_s = time.perf_counter()
    board.agent.start()
    try:
        notifier.await_ready(60)
    except TimeoutError as error:
        raise StepError("the agent did not become ready within 60 s", board.log) from error
    ready_s = time.perf_counter() - began_s
    with socket.create_connection(("127.0.0.1", board.port), timeout=1) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        if not client.recv(64).startswith(b"HTTP/1.1 200"):
            raise StepError("the agent said READY=1, but its local API does not answer", board.log)
    return ready_s


def _start_bare() -> float:
    """Return how long a bare interpreter takes to its first statement, in seconds."""
    began_s = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _UNTIL_STARTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - began_s


def _bare_memory_mb() -> tuple[float, float]:
    process = subprocess.Popen([sys.executable, "-c", _BARE])
    try:
        time.sleep(1)
        return _memory_mb(process.pid)
    finally:
        process.kill()
        process.wait()


def _cpu_s(pid: int) -> float:
    """Return user and system time of a process and of its children that ended, in seconds (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _ran_s(pid: int) -> float:
    """Return how long the living threads of a process ran, in seconds: finer than the 10 ms ticks of ``stat``."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def _memory_mb(pid: int) -> tuple[float, float]:
    """Return RSS and PSS in MB (10**6 bytes)."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        sizes[name] = int(value) * 1024 / _MB
    return sizes["Rss:"], sizes["Pss:"]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found
