from __future__ import annotations

import os
from pathlib import Path

import pytest

from garrison_agent.runtimes.cores import read_cores, read_quota, worker_threads

FOUR = {cpu: str(cpu) for cpu in range(4)}
SIBLINGS = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [
        (FOUR, None, 3),
        (SIBLINGS, None, 3),
        ({0: "0"}, None, 1),
        ({0: "0,4", 4: "0,4"}, None, 1),
        (FOUR, 2.5, 2),
        (FOUR, 0.5, 1),
        (FOUR, 8.0, 3),
    ],
)
def test_real_cores_but_one_and_no_more_than_the_quota(
    cores: dict[int, str], quota: float | None, threads: int
) -> None:
    assert worker_threads(cores, quota) == threads


def test_siblings_are_read_where_the_kernel_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    for cpu in (0, 1):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text("0-1\n", encoding="ascii")
    assert read_cores(tmp_path) == {0: "0-1", 1: "0-1", 5: "cpu5"}


def test_this_machine_has_cores() -> None:
    assert set(read_cores()) == os.sched_getaffinity(0)


def groups(folder: Path, **quotas: str) -> Path:
    """Make control groups; ``a__b`` is b in a, and ``root`` their root."""
    for name, quota in quotas.items():
        path = folder / "cgroup" / name.replace("__", "/") if name != "root" else folder / "cgroup"
        path.mkdir(parents=True, exist_ok=True)
        (path / "cpu.max").write_text(quota + "\n", encoding="ascii")
    return folder / "cgroup"


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"a__b": "max 100000"}, None),
        ({"a__b": "150000 100000"}, 1.5),
        ({"a__b": "max 100000", "a": "200000 100000"}, 2.0),
        ({"a__b": "300000 100000", "a": "50000 100000", "root": "max 100000"}, 0.5),
        ({"a__b": "nonsense"}, None),
        ({"a__b": "1 0"}, None),
    ],
)
def test_the_least_quota_of_a_group_and_those_around_it_counts(
    tmp_path: Path, quotas: dict[str, str], expected: float | None
) -> None:
    process = tmp_path / "self"
    process.write_text("1:cpu:/elsewhere\n0::/a/b\n", encoding="ascii")
    assert read_quota(process, groups(tmp_path, **quotas)) == expected


@pytest.mark.parametrize("content", ["", "4:cpu:/a\n"])
def test_without_version_two_there_is_none(tmp_path: Path, content: str) -> None:
    process = tmp_path / "self"
    process.write_text(content, encoding="ascii")
    assert read_quota(process, groups(tmp_path, a="100000 100000")) is None
    assert read_quota(tmp_path / "absent", tmp_path) is None
