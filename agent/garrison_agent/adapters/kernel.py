"""What Linux tells of its processors, memory, and temperatures (proc(5); Documentation/hwmon/sysfs-interface.rst).

A library for this would be one of the larger things that an idle agent keeps in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TIMES = 8
"""user, nice, system, idle, iowait, irq, softirq, steal; guests' times behind them are counted in the first two."""


class CpuTimes(NamedTuple):
    """Clock ticks of all processors since the board started."""

    busy: int
    total: int

    def percent_since(self, before: CpuTimes) -> float:
        """Return the share of all processors that was in use since then; 0 if no time has passed."""
        total = self.total - before.total
        if total <= 0:
            return 0.0
        return min(100.0, max(0.0, 100.0 * (self.busy - before.busy) / total))  # the kernel lets iowait shrink


def cpu_times(stat: Path = Path("/proc/stat")) -> CpuTimes:
    """Return the processors' times."""
    times = [int(word) for word in stat.read_text(encoding="ascii").partition("\n")[0].split()[1 : 1 + _TIMES]]
    _, _, _, idle, iowait, *_ = times
    return CpuTimes(sum(times) - idle - iowait, sum(times))


def memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Return the board's memory, and how much of it programs could have now without swapping."""
    kib = {}
    for line in meminfo.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            kib[name] = int(value.split()[0])
    return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024


def temperatures_c(classes: Path = Path("/sys/class")) -> list[float]:
    """Return what every sensor says, in degrees Celsius; of thermal zones where there are no other sensors."""
    found = list(_millidegrees(classes, "hwmon/hwmon*/temp*_input", "hwmon/hwmon*/device/temp*_input"))
    return found or list(_millidegrees(classes, "thermal/thermal_zone*/temp"))


def _millidegrees(classes: Path, *patterns: str) -> Iterator[float]:
    for pattern in patterns:
        for path in classes.glob(pattern):
            try:
                yield int(path.read_text(encoding="ascii")) / 1000
            except (OSError, ValueError):  # a sensor that is switched off says so with an error
                continue
