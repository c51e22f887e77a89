"""Kills of everything else: broker, controller, worker. Nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.file_types import FileTypes
from demo.fleet import BIN, ROOT, Board
from demo.processes import wait_for
from demo.steps import FILES
from tests.e2e.conftest import GOOD, Scene

pytestmark = pytest.mark.e2e
SAMPLE = ROOT / "demo/fleet.py"


@pytest.fixture(scope="module")
def board(scene: Scene) -> Iterator[Board]:
    """A board that serves the good version."""
    board = scene.board("steady")
    board.start()
    assert scene.settle(scene.roll_out(board, GOOD))["status"] == "FINISHED"
    yield board
    board.agent.stop()


def exact(scene: Scene, board: Board) -> bool:
    """Tell whether every row recorded until now has its receipt and came exactly once."""
    rows = scene.fleet.delivered(board)
    return len(rows) == 2 and all(row.exact for row in rows)


def worker_pids(board: Board) -> list[int]:
    """Return the process ids of the board's workers."""
    children = Path(f"/proc/{board.agent.pid}/task/{board.agent.pid}/children")
    candidates = {
        int(pid) for task in children.parent.parent.iterdir() for pid in (task / "children").read_text().split()
    }
    return [pid for pid in candidates if b"runtimes.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("who", ["broker", "controller", "both"])
def test_a_killed_server_loses_nothing(scene: Scene, board: Board, who: str) -> None:
    fleet = scene.fleet
    victims = {"broker": [fleet.broker], "controller": [fleet.controller], "both": [fleet.broker, fleet.controller]}[
        who
    ]
    client = FileTypes(board.url, FILES)
    for process in victims:
        process.kill()
    before = board.pending()
    for _ in range(5):
        assert client.identify(SAMPLE).label == "python"
    wait_for("rows without receipt", lambda: board.pending() > before, timeout_s=30, log=board.log)
    if fleet.broker in victims:
        fleet.start_broker()
    if fleet.controller in victims:
        fleet.start_controller()
    assert exact(scene, board)


def test_a_controller_killed_while_rows_arrive_takes_none_twice(scene: Scene, board: Board) -> None:
    client = FileTypes(board.url, FILES)
    for _ in range(3):
        client.identify(SAMPLE)
        scene.fleet.controller.kill()
        client.identify(SAMPLE)
        scene.fleet.start_controller()
    assert exact(scene, board)


def test_a_killed_worker_is_replaced_and_its_request_ends(scene: Scene, board: Board) -> None:
    pids = worker_pids(board)
    assert len(pids) == 1
    outcomes: list[str] = []

    def ask() -> None:
        try:
            outcomes.append(FileTypes(board.url, FILES).identify(SAMPLE).label)
        except OSError as error:
            outcomes.append(type(error).__name__)

    asking = threading.Thread(target=ask)
    os.kill(pids[0], signal.SIGKILL)
    asking.start()
    asking.join(60)
    assert not asking.is_alive()
    assert len(outcomes) == 1
    wait_for("another worker", lambda: bool(board.alias(FILES).get("loaded")), timeout_s=30, log=board.log)
    assert worker_pids(board) != pids
    assert FileTypes(board.url, FILES).identify(SAMPLE).label == "python"
    assert exact(scene, board)


def test_a_killed_agent_leaves_no_worker_behind(scene: Scene, board: Board) -> None:
    pids = worker_pids(board)
    assert pids
    board.agent.kill()
    wait_for("the workers' end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), timeout_s=15)
    board.start()
    wait_for("the model", lambda: bool(board.alias(FILES).get("loaded")), timeout_s=30, log=board.log)
    assert exact(scene, board)


def test_management_needs_the_socket(board: Board) -> None:
    for path in (f"/models/unload/{FILES}", f"/garrison/v1/models/{FILES}/unload"):
        request = urllib.request.Request(board.url + path, method="POST" if "garrison" in path else "GET")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 403
        caught.value.close()
    assert board.alias(FILES)["loaded"]


def test_a_board_without_enrolment_says_what_to_do(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n')
    command = [str(BIN / "garrison-agent"), "run", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "garrison-agent enroll" in done.stderr


def test_errors_of_the_local_api_are_openais(board: Board) -> None:
    body = json.dumps({"model": "no-such-model", "messages": [{"role": "user", "content": "hi"}]}).encode()
    request = urllib.request.Request(f"{board.url}/v1/chat/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    error = json.load(caught.value)["error"]
    caught.value.close()
    assert caught.value.code == 404
    assert set(error) >= {"message", "type", "param", "code"}
