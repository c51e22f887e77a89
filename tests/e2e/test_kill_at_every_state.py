"""SIGKILL of the agent at every saved state of a deployment: the right model serves afterwards, nothing is lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from demo.file_types import FileTypes
from demo.fleet import ROOT, Board
from demo.processes import Process, wait_for
from demo.steps import FILES
from tests.e2e.conftest import FAILING, GOOD, NEXT, Scene

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def victim(scene: Scene) -> Iterator[Board]:
    """A board that serves the good version."""
    board = scene.board("killed")
    board.start()
    assert scene.settle(scene.roll_out(board, GOOD))["status"] == "FINISHED"
    yield board
    board.agent.stop()


def die_at(board: Board, state: str, version: str) -> None:
    """Restart the board's agent so that it dies when it has saved ``state``, and wait for that."""
    board.agent.stop()
    command = [sys.executable, "-m", "tests.e2e.kill_when_saved", state, version, str(board.config)]
    doomed = Process(f"agent that dies at {state}", command, board.log, {"PYTHONPATH": str(ROOT)})
    doomed.start()
    try:
        wait_for(f"death at {state}", lambda: not doomed.running(), timeout_s=60, log=board.log)
    finally:
        doomed.kill()


def serving(board: Board) -> str:
    """Return the version that serves, "" while none does."""
    one = board.alias(FILES)
    return str(one["serving"]).split(":")[-1] if one.get("loaded") else ""


def complete(scene: Scene, board: Board) -> bool:
    """Tell whether every row recorded until now has its receipt and came exactly once."""
    rows = scene.fleet.delivered(board)
    return len(rows) == 2 and all(row.exact for row in rows)


@pytest.mark.parametrize(
    "state",
    ["ASSIGNED", "DOWNLOADING", "VERIFYING", "STAGED", "LOADING", "EVALUATING", "SOAKING", "ACTIVE"],
)
def test_a_deployment_goes_on_after_a_kill(scene: Scene, victim: Board, state: str) -> None:
    current = serving(victim)
    version = NEXT if current == GOOD else GOOD
    rollout = scene.roll_out(victim, version)
    die_at(victim, state, version)
    victim.start()
    assert scene.settle(rollout)["status"] == "FINISHED"
    wait_for(f"version {version}", lambda: serving(victim) == version, timeout_s=30, log=victim.log)
    assert FileTypes(victim.url, FILES).identify(ROOT / "demo/fleet.py").label == "python"
    assert complete(scene, victim)


@pytest.mark.parametrize("state", ["ROLLING_BACK", "ROLLED_BACK"])
def test_a_rollback_goes_on_after_a_kill(scene: Scene, victim: Board, state: str) -> None:
    before = serving(victim)
    rollout = scene.roll_out(victim, FAILING)
    die_at(victim, state, FAILING)
    victim.start()
    ended = scene.settle(rollout)
    assert ended["status"] == "PAUSED"
    assert [one["deployment"] for one in scene.boards(ended)] == ["ROLLED_BACK"]
    scene.fleet.garrison("rollout", "stop", rollout, who="rolf")
    wait_for("the version before", lambda: serving(victim) == before, timeout_s=30, log=victim.log)
    assert complete(scene, victim)


def test_a_repair_goes_on_after_a_kill(scene: Scene, victim: Board) -> None:
    before = serving(victim)
    blob = max(
        (one for one in (victim.state / "blobs").rglob("*") if one.is_file()), key=lambda one: one.stat().st_size
    )
    mode = blob.stat().st_mode
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\x00damaged\x00")
    blob.chmod(mode)
    die_at(victim, "REPAIRING", before)
    victim.start()
    wait_for("the repair", lambda: serving(victim) == before, timeout_s=60, log=victim.log)
    assert complete(scene, victim)
