"""How many threads a worker may use: real cores, and no more than the control group grants.

Two threads of one core share its arithmetic units: for matrices the second brings nothing, and each waits for the
slowest. A quota cut into more threads than it has cores stops all of them in every period.
Source: Linux Documentation/admin-guide/cgroup-v2.rst (cpu.max) and cputopology.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath


def worker_threads(cores: Mapping[int, str], quota: float | None) -> int:
    """Return the threads of a worker, one core left to everything else.

    ``cores``: for each processor that this process may use, a name of its core, the same for siblings. ``quota``: of
    how many processors the time may be used; None: all.
    """
    threads = max(1, len(set(cores.values())) - 1)
    return threads if quota is None else max(1, min(threads, int(quota)))


def read_cores(system: Path = Path("/sys/devices/system/cpu")) -> dict[int, str]:
    """Return the processors that this process may use, and their cores; each its own where the kernel does not say."""
    cores = {}
    for cpu in os.sched_getaffinity(0):
        cores[cpu] = f"cpu{cpu}"
        with contextlib.suppress(OSError):
            siblings = (system / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
            cores[cpu] = siblings or cores[cpu]
    return cores


def read_quota(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the processors' worth of time that this process's control groups grant, the least of them; None: no bound.

    Only version 2 is read.
    """
    try:
        lines = process.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if path is None:
        return None
    group = PurePosixPath(path.lstrip("/"))
    quotas = (_quota(root / part / "cpu.max") for part in (group, *group.parents))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(file: Path) -> float | None:
    try:
        allowed, period = file.read_text(encoding="ascii").split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
