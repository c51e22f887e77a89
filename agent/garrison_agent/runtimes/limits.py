"""What a worker process limits itself to, set in the process itself before it loads anything native.

Not between fork and exec: the agent has threads, and code that runs there may wait for a lock that nobody will release.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource

from garrison_agent.runtimes.spec import Limits

OOM_SCORE = 500
"""When memory runs out, the kernel takes a worker long before the agent, which can start it again."""
NICE = 5
"""Behind the agent, which has to answer while workers use every core."""
VIRTUAL_SLACK_MB = 1024
"""RLIMIT_DATA counts private memory that is reserved, used or not: thread stacks, buffers that are never filled."""
MIB = 1024 * 1024

_log = logging.getLogger(__name__)


def apply(limits: Limits, group: str | None) -> None:
    """Join ``group``, or set what the process can set for itself, and let the kernel prefer it when memory runs out.

    Without a group that can be joined, memory is bounded by RLIMIT_DATA: private writable memory. RLIMIT_AS would count
    the mapped file of weights, which takes no memory that others could not have back; RLIMIT_RSS does nothing on Linux.
    A worker that meets it is refused an allocation, and ends. A share of the processor becomes a number of cores,
    rounded up.
    """
    with contextlib.suppress(OSError):  # some containers forbid it; the limit below still holds
        _write("/proc/self/oom_score_adj", str(OOM_SCORE))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    if group is not None:
        try:
            _write(f"{group}/cgroup.procs", "0")
        except OSError as error:
            _log.warning("%s cannot be joined, the worker limits itself: %s", group, error.strerror)
        else:
            return
    if limits.memory_mb:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = (limits.memory_mb + VIRTUAL_SLACK_MB) * MIB
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    if limits.cpu_percent:
        cores = sorted(os.sched_getaffinity(0))
        # The last ones: interrupts and the agent mostly run on the first.
        os.sched_setaffinity(0, cores[-max(1, -(-limits.cpu_percent // 100)) :])


def forget_peak() -> None:
    """Let the kernel's peak of this process begin anew: what was needed only for loading is over.

    Source: proc(5), /proc/pid/clear_refs, since Linux 4.0. Without it the peak stays too high, never too low.
    """
    with contextlib.suppress(OSError):
        _write("/proc/self/clear_refs", "5")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
