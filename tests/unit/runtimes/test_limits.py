"""What a worker sets for itself, seen from outside in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from garrison_agent.runtimes.cgroups import Groups, take_over
from garrison_agent.runtimes.limits import MIB, NICE, OOM_SCORE, VIRTUAL_SLACK_MB
from garrison_agent.runtimes.spec import Limits

REPORT = """
import json, os, resource, sys
from garrison_agent.runtimes import limits
from garrison_agent.runtimes.spec import Limits
limits.apply(Limits(**json.loads(sys.argv[1])), sys.argv[2] or None)
print(json.dumps({
    "oom": int(open("/proc/self/oom_score_adj").read()),
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "data": resource.getrlimit(resource.RLIMIT_DATA)[0],
    "cores": len(os.sched_getaffinity(0)),
}))
"""
PEAK = """
from garrison_agent.runtimes.limits import forget_peak
from garrison_agent.runtimes.process import peak_mb
ballast = b"x" * (100 << 20)
before = peak_mb("self")
del ballast
forget_peak()
print(before, peak_mb("self"))
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_worker_is_taken_before_the_agent_and_bounds_itself() -> None:
    seen = json.loads(run(REPORT, json.dumps({"memory_mb": 600, "cpu_percent": 100}), ""))
    assert seen == {"oom": OOM_SCORE, "nice": NICE, "data": (600 + VIRTUAL_SLACK_MB) * MIB, "cores": 1}


def test_no_limit_is_no_limit() -> None:
    seen = json.loads(run(REPORT, json.dumps({}), ""))
    assert seen["data"] == resource.getrlimit(resource.RLIMIT_DATA)[0]
    assert seen["cores"] == len(os.sched_getaffinity(0))


def test_in_a_group_it_joins_that_and_leaves_the_limits_to_it(tmp_path: Path) -> None:
    seen = json.loads(run(REPORT, json.dumps({"memory_mb": 600, "cpu_percent": 100}), str(tmp_path)))
    assert (tmp_path / "cgroup.procs").read_text() == "0"
    assert seen["data"] == resource.getrlimit(resource.RLIMIT_DATA)[0]


def test_where_it_may_not_join_its_group_it_says_so_and_limits_itself(tmp_path: Path) -> None:
    arguments = [json.dumps({"memory_mb": 600, "cpu_percent": 100}), str(tmp_path / "gone")]
    done = subprocess.run([sys.executable, "-c", REPORT, *arguments], capture_output=True, text=True, check=False)
    assert "the worker limits itself" in done.stderr
    seen = json.loads(done.stdout)
    assert (seen["data"], seen["cores"]) == ((600 + VIRTUAL_SLACK_MB) * MIB, 1)


def test_what_was_needed_for_loading_only_is_not_part_of_the_peak() -> None:
    before, after = map(int, run(PEAK).split())
    assert before >= 100
    assert after < before - 50


def test_a_group_holds_the_limits_and_tells_of_a_kill(tmp_path: Path) -> None:
    group = Groups(tmp_path).make(Limits(memory_mb=512, cpu_percent=150))
    assert group is not None
    read = {file.name: file.read_text() for file in group.path.iterdir()}
    assert read == {
        "cpu.weight": "50",
        "memory.max": str(512 * MIB),
        "memory.oom.group": "1",
        "cpu.max": "150000 100000",
    }
    assert not group.out_of_memory
    (group.path / "memory.events").write_text("low 0\nhigh 3\nmax 9\noom 1\noom_kill 0\noom_group_kill 0\n")
    assert not group.out_of_memory
    (group.path / "memory.events").write_text("low 0\nhigh 3\nmax 9\noom 1\noom_kill 4\n")
    assert group.out_of_memory


def test_where_no_group_can_be_made_the_worker_limits_itself(tmp_path: Path) -> None:
    assert Groups(tmp_path / "gone").make(Limits(memory_mb=1)) is None


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A service's control group that systemd has delegated."""
    base = tmp_path / "system.slice" / "agent.service"
    base.mkdir(parents=True)
    (base / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "own").write_text("9:name=systemd:/\n0::/system.slice/agent.service\n")
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1")
    return base


def test_a_delegated_group_is_taken_over_and_cleared_of_what_a_killed_agent_left(tmp_path: Path, service: Path) -> None:
    (service / "worker-7-1").mkdir()
    groups = take_over(tmp_path, tmp_path / "own")
    assert groups is not None
    assert (service / "agent" / "cgroup.procs").read_text() == str(os.getpid())
    assert (service / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert not (service / "worker-7-1").exists()
    made = groups.make(Limits())
    assert made is not None
    assert made.path.parent == service


def test_nothing_else_is_touched(tmp_path: Path, service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_text("9:memory:/a\n4:cpu:/b\n")
    assert take_over(tmp_path, tmp_path / "old") is None
    (service / "cgroup.controllers").write_text("pids\n")
    assert take_over(tmp_path, tmp_path / "own") is None
    (service / "cgroup.controllers").write_text("cpu memory\n")

    def not_marked(path: Path, name: str) -> bytes:
        raise OSError(61, "No data available")

    monkeypatch.setattr(os, "getxattr", not_marked)
    assert take_over(tmp_path, tmp_path / "own") is None
    assert not (service / "agent").exists()
