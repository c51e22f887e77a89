from __future__ import annotations

from pathlib import Path

import pytest

from garrison_agent.adapters.sensors import Throttling, cpu_features, inventory, read_sample, read_throttling


def test_a_sample_of_this_machine_is_plausible(tmp_path: Path) -> None:
    sample = read_sample(tmp_path)
    assert 0 <= sample.cpu_percent <= 100
    assert sample.load1 >= 0
    assert 0 < sample.memory_used_mb < sample.memory_total_mb
    assert 0 <= sample.disk_free_mb <= sample.disk_total_mb
    assert sample.temperature_c is None or -40 < sample.temperature_c < 150
    assert 0 < sample.rss_mb < sample.memory_total_mb
    assert sample.uptime_s > 0


def test_the_inventory_names_what_a_variant_may_require(tmp_path: Path) -> None:
    board = inventory(tmp_path)
    assert board.architecture
    assert board.os
    assert board.cpu_count >= 1
    assert board.memory_mb > 0
    assert set(board.engines) == {"llama.cpp", "onnxruntime"}  # the test environment has both


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 fma f16c hypervisor\n",
            ("avx", "avx2", "f16c", "fma", "sse4_2"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp i8mm\n", ("asimd", "asimddp", "i8mm")),
        ("processor\t: 0\n", ()),
    ],
)
def test_instruction_sets_are_read_on_x86_and_arm(tmp_path: Path, text: str, features: tuple[str, ...]) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert cpu_features(cpuinfo) == features


def test_a_board_without_cpuinfo_claims_nothing(tmp_path: Path) -> None:
    assert cpu_features(tmp_path / "missing") == ()


def test_a_raspberry_pi_says_why_it_is_slow(tmp_path: Path) -> None:
    firmware = tmp_path / "get_throttled"
    firmware.write_text("50005\n")
    assert read_throttling(firmware, tmp_path) == Throttling(
        now=("under-voltage", "throttled"), since_start=("under-voltage", "throttled")
    )
    firmware.write_text("0\n")
    assert read_throttling(firmware, tmp_path) == Throttling()


def test_counters_of_all_cores_add_up(tmp_path: Path) -> None:
    for core, count in enumerate((3, 4)):
        folder = tmp_path / f"cpu{core}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    assert read_throttling(tmp_path / "none", tmp_path) == Throttling(count=7)


def test_a_board_that_says_nothing_of_throttling(tmp_path: Path) -> None:
    assert read_throttling(tmp_path / "none", tmp_path) is None
