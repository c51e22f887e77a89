"""What the board measures of itself, and what it is."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from garrison_agent.adapters.kernel import CpuTimes, cpu_times, memory_bytes, temperatures_c
from garrison_agent.runtimes.process import resident_mb
from garrison_protocol.messages.report import Inventory
from garrison_protocol.states import Engine

_MIB = 1024 * 1024
_ENGINE_PACKAGES = {Engine.LLAMA_CPP: "llama_cpp", Engine.ONNXRUNTIME: "onnxruntime"}
_CPU_FEATURES = frozenset(
    {"sse4_2", "avx", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}
    | {"fma", "f16c"}
    | {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"}
)
"""Kernel names of the instruction sets that inference engines choose their code by."""


_FIRMWARE = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
"""Raspberry Pi: a hexadecimal mask; the lower half is now, the upper half since the start."""
_FIRMWARE_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


@dataclass(frozen=True, slots=True)
class Throttling:
    """Why the board is slower than it could be: ``now``, and at some time since its start.

    ``count`` adds up how often its cores were slowed for heat, where the kernel counts that (x86).
    """

    now: tuple[str, ...] = ()
    since_start: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading. Sizes in MiB; ``cpu_percent`` of all cores since the reading before (the board's start)."""

    cpu_percent: float
    load1: float
    memory_used_mb: int
    memory_total_mb: int
    disk_free_mb: int
    disk_total_mb: int
    temperature_c: float | None
    rss_mb: int
    uptime_s: int


class _Processors:
    """Remembers the reading before."""

    def __init__(self) -> None:
        self._before = CpuTimes(0, 0)

    def percent(self) -> float:
        before, self._before = self._before, cpu_times()
        return self._before.percent_since(before)


_processors = _Processors()


def read_sample(disk: Path = Path("/")) -> Sample:
    """Return a reading now; ``disk`` is a folder on the file system to look at, ``rss_mb`` this process's memory.

    The hottest sensor counts; None where the board has none. ``uptime_s`` is the board's.
    """
    total, available = memory_bytes()
    usage = os.statvfs(disk)
    return Sample(
        cpu_percent=_processors.percent(),
        load1=os.getloadavg()[0],
        memory_used_mb=(total - available) // _MIB,
        memory_total_mb=total // _MIB,
        disk_free_mb=usage.f_bavail * usage.f_frsize // _MIB,
        disk_total_mb=usage.f_blocks * usage.f_frsize // _MIB,
        temperature_c=_temperature_c(),
        rss_mb=int(resident_mb("self") or 0),
        uptime_s=int(time.clock_gettime(time.CLOCK_BOOTTIME)),
    )


def inventory(disk: Path = Path("/")) -> Inventory:
    """Return what the board is; ``disk`` is a folder on the file system that holds models."""
    usage = os.statvfs(disk)
    return Inventory(
        architecture=platform.machine(),
        os=_os_name(),
        cpu_count=os.cpu_count() or 1,
        cpu_features=cpu_features(),
        memory_mb=memory_bytes()[0] // _MIB,
        disk_free_mb=usage.f_bavail * usage.f_frsize // _MIB,
        engines=tuple(engine.value for engine, package in _ENGINE_PACKAGES.items() if find_spec(package) is not None),
    )


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Return the instruction sets that engines care about, sorted (x86 ``flags``, ARM ``Features``)."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in {"flags", "features"}:
            return tuple(sorted(_CPU_FEATURES.intersection(value.split())))
    return ()


def read_throttling(firmware: Path = _FIRMWARE, cores: Path = Path("/sys/devices/system/cpu")) -> Throttling | None:
    """Return whether the board slows itself down; None where it does not say.

    Source: Raspberry Pi documentation, "vcgencmd", get_throttled.
    """
    counters = [path for path in cores.glob("cpu*/thermal_throttle/core_throttle_count") if path.is_file()]
    try:
        mask = int(firmware.read_text(), 16)
    except (OSError, ValueError):
        if not counters:
            return None
        mask = 0
    return Throttling(
        now=tuple(name for bit, name in _FIRMWARE_BITS.items() if mask >> bit & 1),
        since_start=tuple(name for bit, name in _FIRMWARE_BITS.items() if mask >> (bit + 16) & 1),
        count=sum(_number(path) for path in counters),
    )


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _temperature_c() -> float | None:
    # Broken sensors say 0 or 255.
    plausible = [value for value in temperatures_c() if -40.0 < value < 150.0 and value != 0.0]
    return max(plausible, default=None)


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()
