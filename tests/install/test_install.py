"""Install the agent with its unit on a booted Debian, serve both models there, kill it, see systemd bring it back.

Run by ``make test-install`` (root). A unit that scores well may still not run: here it runs, hardening included.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from demo.fleet import ROOT, Fleet
from demo.packages import magika_file, pack, smollm2_file
from demo.processes import free_port, wait_for
from demo.steps import CHAT, FILES, PEOPLE, chat
from tests.install.container import Container, booted, require_tools

CACHE = ROOT / ".cache"
VENV = "/usr/lib/garrison/venv"
AGENT = f"{VENV}/bin/garrison-agent"
CONTROL_GROUP = "/sys/fs/cgroup/system.slice/garrison-agent.service"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A broker and a controller out here, with both models published."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), ["edge-1"])
    try:
        fleet.bring_up(PEOPLE, publisher="piet")
        fleet.publish(pack(fleet, CHAT, smollm2_file(), path="model.gguf"), who="piet")
        fleet.publish(pack(fleet, FILES, magika_file(), path="model.onnx"), who="piet")
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A booted Debian that sees the wheels and the units of this checkout."""
    require_tools()
    wheels = CACHE / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "-w", str(wheels), "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*command, f"{ROOT}[agent,llama,onnx]"], check=True)
    binds = {wheels: "/mnt/wheels", ROOT / "systemd": "/mnt/systemd"}
    with booted(CACHE, tmp_path_factory.mktemp("container"), binds) as system:
        yield system


def install(container: Container, fleet: Fleet, port: int) -> None:
    """Do what docs/operations.md tells an operator to do on a board."""
    container.run("python3", "-m", "venv", VENV)
    pip = ["-q", "install", "--no-index", "--find-links", "/mnt/wheels", "garrison[agent,llama,onnx]"]
    container.run(f"{VENV}/bin/pip", *pip, timeout_s=600)
    container.run("install", "-D", "-m644", "/mnt/systemd/garrison-agent.service", "-t", "/etc/systemd/system")
    container.run("install", "-D", "-m644", "/mnt/systemd/garrison.sysusers.conf", "/usr/lib/sysusers.d/garrison.conf")
    container.run("install", "-D", "-m644", "/mnt/systemd/garrison.tmpfiles.conf", "/usr/lib/tmpfiles.d/garrison.conf")
    container.run("systemd-sysusers")
    container.run("systemd-tmpfiles", "--create")
    (container.root / "etc/garrison").mkdir(exist_ok=True)
    (container.root / "etc/garrison/agent.toml").write_text(
        f"[api]\nport = {port}\n[telemetry]\ninterval_s = 2\nheartbeat_s = 5\n[mqtt]\nreconnect_max_s = 3\n"
    )
    token = fleet.json("device", "token", "create", "edge-1", "--group", "/demo/", who="dora")["enrolment"]
    container.run("runuser", "-u", "garrison", "--", AGENT, "enroll", token)
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "enable", "--now", "garrison-agent.service")


def loaded(container: Container) -> set[str]:
    """Return the aliases that answer on the board."""
    done = container.try_run(AGENT, "status", "-o", "json")
    if done.returncode != 0:
        return set()
    return {one["alias"] for one in json.loads(done.stdout)["aliases"] if one["loaded"]}


def controllers(container: Container) -> set[str]:
    """Return what the agent's control group controls; nothing where this machine keeps to version 1 of them."""
    return set(container.try_run("cat", f"{CONTROL_GROUP}/cgroup.controllers").stdout.split())


def restarts(container: Container) -> int:
    """Return how often systemd has restarted the agent."""
    return int(container.run("systemctl", "show", "-P", "NRestarts", "garrison-agent.service"))


@pytest.mark.timeout(1500)
def test_the_agent_serves_under_its_unit_and_comes_back_after_a_kill(fleet: Fleet, container: Container) -> None:
    board = fleet.boards[0]
    board.port = free_port()
    install(container, fleet, board.port)
    names = {one["alias"]: one["name"] for one in fleet.json("model", "list", who="anna")["models"]}
    for alias in (CHAT, FILES):
        words = ["rollout", "create", alias, "--model", names[alias], "--version", "1.0.0"]
        fleet.garrison(*words, "--group", "all=*", "--soak", "1s", who="rolf")
        fleet.garrison("rollout", "approve", alias, who="anna")
    container.wait_for("both models in service", lambda: loaded(container) == {CHAT, FILES}, timeout_s=180)
    for alias in (CHAT, FILES):
        wait_for(f"rollout {alias}", partial(finished, fleet, alias), timeout_s=60)

    text, pieces, _, _ = chat(board, "What is the capital of France?")
    assert pieces > 1
    assert text.strip()
    assert "python" in classify(board.url, Path(__file__))
    assert restarts(container) == 0

    if {"cpu", "memory"} <= controllers(container):
        assert len(container.run("sh", "-c", f"ls -d {CONTROL_GROUP}/worker-*").split()) == 2

    container.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "garrison-agent.service")
    container.wait_for("systemd's restart", lambda: restarts(container) == 1, timeout_s=60)
    container.wait_for("both models again", lambda: loaded(container) == {CHAT, FILES}, timeout_s=120)
    assert chat(board, "What is the capital of France?")[0] == text
    assert "python" in classify(board.url, Path(__file__))
    assert container.run("systemctl", "is-active", "garrison-agent.service").strip() == "active"


def finished(fleet: Fleet, rollout: str) -> bool:
    """Tell whether a rollout has come to its end."""
    return bool(fleet.json("rollout", "show", rollout, who="anna")["status"] == "FINISHED")


def classify(url: str, path: Path) -> str:
    """Ask the board what a file is."""
    from demo.file_types import FileTypes

    return FileTypes(url, FILES).identify(path).label
