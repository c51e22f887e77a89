"""Control groups for workers, where systemd lets the agent have its own (cgroup v2, ``Delegate=``).

Layout below the service's group: ``agent`` holds the agent, ``worker-<pid>-<n>`` one worker each; version 2 allows
processes in leaves only. Source: Linux Documentation/admin-guide/cgroup-v2.rst; systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from pathlib import Path

from garrison_agent.runtimes.spec import Limits

ROOT = Path("/sys/fs/cgroup")
CPU_WEIGHT = 50
"""Half of the agent's: it has to answer while workers use every core."""
_PERIOD_US = 100_000

_log = logging.getLogger(__name__)


class Group:
    """The control group of one worker. The worker joins it by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel ended something in it because its memory limit, or the board's memory, was reached."""
        with contextlib.suppress(OSError):
            for line in (self.path / "memory.events").read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count) > 0
        return False

    def remove(self) -> None:
        """Remove it; its processes have ended."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


class Groups:
    """Makes groups below one that the agent owns."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._numbers = itertools.count(1)

    def make(self, limits: Limits) -> Group | None:
        """Return a new group with ``limits``, or None where that cannot be had now."""
        group = Group(self._base / f"worker-{os.getpid()}-{next(self._numbers)}")
        try:
            group.path.mkdir()
            _write(group.path / "cpu.weight", str(CPU_WEIGHT))
            if limits.memory_mb:
                _write(group.path / "memory.max", str(limits.memory_mb * 1024 * 1024))
                _write(group.path / "memory.oom.group", "1")
            if limits.cpu_percent:
                _write(group.path / "cpu.max", f"{limits.cpu_percent * _PERIOD_US // 100} {_PERIOD_US}")
        except OSError as error:
            _log.warning("no control group for a worker, it limits itself: %s", error)
            group.remove()
            return None
        return group


def take_over(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> Groups | None:
    """Move the agent into a group of its own below the service's; None where that was not delegated to it.

    systemd marks what it delegates (``user.delegate``, since version 251). Nothing else is touched: the group of a
    login session may be writable too, and is not ours.
    """
    try:
        name = next(line[3:] for line in own.read_text(encoding="ascii").splitlines() if line.startswith("0::"))
        base = root / name.lstrip("/")
        if os.getxattr(base, "user.delegate") != b"1":
            return None
        if not {"cpu", "memory"} <= set((base / "cgroup.controllers").read_text(encoding="ascii").split()):
            return None
        for left in base.glob("worker-*"):
            Group(left).remove()
        (base / "agent").mkdir(exist_ok=True)
        _write(base / "agent" / "cgroup.procs", str(os.getpid()))
        _write(base / "cgroup.subtree_control", "+cpu +memory")
    except (OSError, StopIteration):
        return None
    return Groups(base)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="ascii")
