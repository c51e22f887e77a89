from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from garrison_agent.adapters.kernel import CpuTimes, cpu_times, memory_bytes, temperatures_c
from garrison_agent.adapters.sensors import read_sample

STAT = "cpu  100 10 50 800 40 5 5 20 70 3\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 1\n"


def test_times_of_all_processors_without_waiting_and_with_guests_counted_once(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text(STAT)
    assert cpu_times(stat) == CpuTimes(busy=190, total=1030)


@pytest.mark.parametrize(
    ("now", "percent"),
    [((150, 300), 50.0), ((100, 200), 0.0), ((300, 300), 100.0), ((90, 300), 0.0), ((120, 190), 0.0)],
)
def test_a_share_of_the_time_between_two_readings(now: tuple[int, int], percent: float) -> None:
    assert CpuTimes(*now).percent_since(CpuTimes(100, 200)) == percent


def test_memory_that_programs_could_have(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  400 kB\nHugePages_Total:  0\n")
    assert memory_bytes(meminfo) == (1000 * 1024, 400 * 1024)


def test_temperatures_of_sensors_or_else_of_thermal_zones(tmp_path: Path) -> None:
    assert temperatures_c(tmp_path) == []
    (tmp_path / "thermal" / "thermal_zone0").mkdir(parents=True)
    (tmp_path / "thermal" / "thermal_zone0" / "temp").write_text("41000\n")
    assert temperatures_c(tmp_path) == [41.0]
    for number, (folder, text) in enumerate([("hwmon0", "51500\n"), ("hwmon1/device", "-3000\n"), ("hwmon2", "?\n")]):
        (tmp_path / "hwmon" / folder).mkdir(parents=True)
        (tmp_path / "hwmon" / folder / f"temp{number}_input").write_text(text)
    assert temperatures_c(tmp_path) == [51.5, -3.0]


def test_a_sample_says_what_psutil_says(tmp_path: Path) -> None:
    sample, memory, disk = read_sample(tmp_path), psutil.virtual_memory(), psutil.disk_usage(str(tmp_path))
    mib = 1024 * 1024
    assert sample.memory_total_mb == memory.total // mib
    assert sample.disk_total_mb == disk.total // mib
    assert sample.memory_used_mb == pytest.approx((memory.total - memory.available) / mib, rel=0.25)
    assert sample.disk_free_mb == pytest.approx(disk.free / mib, rel=0.1)
    assert sample.rss_mb == pytest.approx(psutil.Process().memory_info().rss / mib, rel=0.1)
    assert 0 <= sample.cpu_percent <= 100
