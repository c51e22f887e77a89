"""What the board measures of itself, and what it is."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

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


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading. Sizes in MiB; ``cpu_percent`` of all cores since the reading before."""

    cpu_percent: float
    load1: float
    memory_used_mb: int
    memory_total_mb: int
    disk_free_mb: int
    disk_total_mb: int
    temperature_c: float | None
    rss_mb: int
    uptime_s: int


def read_sample(disk: Path = Path("/")) -> Sample:
    """Return a reading now; ``disk`` is a folder on the file system to look at, ``rss_mb`` this process's memory.

    The hottest sensor counts; None where the board has none. ``uptime_s`` is the board's.
    """
    memory = psutil.virtual_memory()
    usage = psutil.disk_usage(str(disk))
    return Sample(
        cpu_percent=psutil.cpu_percent(interval=None),
        load1=os.getloadavg()[0],
        memory_used_mb=(memory.total - memory.available) // _MIB,
        memory_total_mb=memory.total // _MIB,
        disk_free_mb=usage.free // _MIB,
        disk_total_mb=usage.total // _MIB,
        temperature_c=_temperature_c(),
        rss_mb=psutil.Process().memory_info().rss // _MIB,
        uptime_s=int(time.clock_gettime(time.CLOCK_BOOTTIME)),
    )


def inventory(disk: Path = Path("/")) -> Inventory:
    """Return what the board is; ``disk`` is a folder on the file system that holds models."""
    return Inventory(
        architecture=platform.machine(),
        os=_os_name(),
        cpu_count=os.cpu_count() or 1,
        cpu_features=cpu_features(),
        memory_mb=psutil.virtual_memory().total // _MIB,
        disk_free_mb=psutil.disk_usage(str(disk)).free // _MIB,
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


def _temperature_c() -> float | None:
    readings = [entry.current for entries in psutil.sensors_temperatures().values() for entry in entries]
    plausible = [value for value in readings if -40.0 < value < 150.0 and value != 0.0]  # broken sensors say 0 or 255
    return max(plausible, default=None)


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()
