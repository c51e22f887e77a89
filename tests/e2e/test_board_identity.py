"""A board's identity from end to end: every way to enrol, and a return months after its certificate ended."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from demo.fleet import Board
from demo.processes import Process, free_port, wait_for
from garrison_agent.adapters.certificates import checked_pair, new_key, request_pem
from garrison_agent.identity import Identity, load_record, save_pair, save_record
from garrison_controller.config import load_config
from garrison_controller.devices.pki import DEVICE_CA, load_authority
from tests.e2e.conftest import Scene

CLOCK_AT_1970 = """\
import sys, time
from garrison_agent.cli.main import main
time.time = lambda real=time.time, start=time.time(): real() - start
sys.exit(main(sys.argv[1:]))
"""
NO_SPREAD = """\
import sys
from garrison_agent.cli.main import main
from garrison_agent.core import certificate
certificate.MAX_SPREAD_S = 0.1
sys.exit(main(sys.argv[1:]))
"""


def new_board(scene: Scene, name: str) -> Board:
    board = Board(scene.fleet, name)
    scene.fleet.boards.append(board)
    board.configure()
    return board


def comes_online(board: Board) -> None:
    board.start()
    wait_for(f"{board.name} online", lambda: bool(board.status()["connected"]), timeout_s=90, log=board.log)


def run_as(board: Board, program: str) -> None:
    """Run the agent with something of it changed."""
    command = [sys.executable, "-c", program, "run", "--config", str(board.config)]
    board.agent = Process(f"agent {board.name}", command, board.log)


def expire(scene: Scene, board: Board, days_ago: int) -> None:
    """Give the board the certificate that it would have so long after its end (below 0: before)."""
    identity = Identity.load(board.state)
    authority = load_authority(load_config(scene.fleet.config), DEVICE_CA)
    key_pem = new_key()
    issued = authority.issue_device(
        identity.device, request_pem(key_pem), 30, datetime.now(UTC) - timedelta(days=30 + days_ago)
    )
    save_pair(board.state, checked_pair(issued.pem, key_pem, identity.device))


def test_a_board_that_was_off_for_months_renews_by_itself(scene: Scene) -> None:
    board = scene.board("edge-months")
    expire(scene, board, 200)
    comes_online(board)
    certificate = board.status()["certificate"]
    assert not certificate["ended"]
    assert certificate["error_code"] is None
    scene.fleet.delivered(board)
    found = scene.fleet.json("audit", "list", "--device", board.name, "--kind", "certificate.*", who="olga")
    assert [entry["kind"] for entry in found["entries"]] == ["certificate.renewed"]
    checks = {check["name"]: check["outcome"] for check in board.run("doctor")["items"]}
    assert (checks["certificate"], checks["renewal"]) == ("ok", "ok")
    board.agent.stop()


def test_over_the_broker_where_the_controller_cannot_be_reached(scene: Scene) -> None:
    board = scene.board("edge-broker")
    expire(scene, board, -5)
    record = load_record(board.state)
    assert record is not None
    save_record(board.state, record.model_copy(update={"url": f"https://127.0.0.1:{free_port()}"}))
    run_as(board, NO_SPREAD)
    comes_online(board)
    connected_with = board.status()["certificate"]["not_after"]

    def renewed() -> bool:
        return bool(board.status()["certificate"]["not_after"] > connected_with)

    wait_for("a renewal over the broker", renewed, timeout_s=120, log=board.log)
    wait_for(f"{board.name} online again", lambda: bool(board.status()["connected"]), timeout_s=60, log=board.log)
    scene.fleet.delivered(board)
    board.agent.stop()


def test_a_board_whose_clock_says_1970_connects_and_serves(scene: Scene) -> None:
    board = scene.board("edge-1970")
    run_as(board, CLOCK_AT_1970)
    comes_online(board)
    rollout = scene.roll_out(board, "1.0.0")
    assert scene.settle(rollout)["status"] == "FINISHED"
    assert board.status()["certificate"]["error_code"] is None
    board.agent.stop()


def test_an_invited_board_waits_for_its_approval(scene: Scene) -> None:
    board = new_board(scene, "edge-invited")
    line = scene.fleet.json("device", "invite", who="dora")["enrolment"]
    asked = board.try_run("enroll", line, "--name", board.name, "--no-wait", "-o", "json")
    assert asked.returncode == 8, asked.stderr
    fingerprint = json.loads(asked.stderr)["error"]["fields"]["fingerprint"]
    waiting = scene.fleet.json("device", "enroll", "list", who="dora")
    assert fingerprint in [request["fingerprint"] for request in waiting]
    again = board.try_run("enroll", line, "--no-wait")
    assert again.returncode == 8
    assert fingerprint in again.stderr
    words = ["device", "enroll", "approve", fingerprint, "--name", board.name, "--group", "/e2e/"]
    scene.fleet.garrison(*words, who="dora")
    done = board.try_run("enroll", line)
    assert done.returncode == 0, done.stderr
    assert f"enrolled as {board.name}" in done.stdout
    comes_online(board)
    board.agent.stop()


def test_a_board_without_a_network_enrols_by_files(scene: Scene, tmp_path: Path) -> None:
    board = new_board(scene, "edge-files")
    request, response = tmp_path / "request.json", tmp_path / "response.json"
    assert board.try_run("enroll", "--offline", "--out", str(request), "--name", board.name).returncode == 0
    answer = scene.fleet.json(
        *("device", "enroll", "approve", "--request", str(request), "--out", str(response), "--group", "/e2e/"),
        who="dora",
    )
    wrong = board.try_run("enroll", "--response", str(response), "--root-sha256", "0" * 64)
    assert wrong.returncode == 6
    done = board.try_run("enroll", "--response", str(response), "--root-sha256", answer["root_sha256"])
    assert done.returncode == 0, done.stderr
    comes_online(board)
    board.agent.stop()


def test_a_batch_gives_names(scene: Scene) -> None:
    line = scene.fleet.json(
        *("device", "token", "create", "--batch", "--uses", "2", "--prefix", "batch-", "--group", "/e2e/"), who="dora"
    )["enrolment"]
    first, second = new_board(scene, "batch-seven"), new_board(scene, "batch-other")
    assert "enrolled as batch-seven" in first.try_run("enroll", line, "--name", "batch-seven").stdout
    assert "enrolled as batch-1" in second.try_run("enroll", line).stdout
    third = new_board(scene, "batch-third").try_run("enroll", line)
    assert third.returncode == 6
    assert "enrolment.token_used" in third.stderr
