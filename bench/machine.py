"""The machine that figures were made on; without it they mean nothing."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Processor, memory, disk, and versions."""

    cpu: str
    cores: int
    memory_mb: int
    kernel: str
    python: str
    filesystem: str
    """Type of the file system that the benchmarks write to."""

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_mb} MB, {self.filesystem}, Linux {self.kernel},"
            f" Python {self.python}"
        )


def this_machine(folder: Path) -> Machine:
    """Return what can be said about this machine and the disk below ``folder``."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            cpu = value.strip()
            break
    return Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory_mb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
        kernel=platform.release(),
        python=sys.version.split()[0],
        filesystem=_filesystem(folder),
    )


def _filesystem(folder: Path) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind
