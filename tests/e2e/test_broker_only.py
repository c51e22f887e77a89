"""A board that reaches the broker and nothing else: metadata, model, anchor, and certificate come over MQTT."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.file_types import FileTypes
from demo.fleet import ROOT, Board
from demo.processes import free_port, wait_for
from demo.steps import FILES
from garrison_agent.identity import load_record, save_record
from tests.e2e.conftest import GOOD, NEXT, Scene
from tests.e2e.test_board_identity import NO_SPREAD, expire, run_as

pytestmark = pytest.mark.e2e


def cut_off(board: Board) -> None:
    """Let the board believe that the controller listens where nobody does."""
    record = load_record(board.state)
    assert record is not None
    save_record(board.state, record.model_copy(update={"url": f"https://127.0.0.1:{free_port()}"}))


def log_of(board: Board) -> str:
    return Path(board.log).read_text(encoding="utf-8")


def test_everything_that_a_board_needs_comes_over_the_broker(scene: Scene) -> None:
    board = scene.board("edge-cut-off")
    cut_off(board)
    expire(scene, board, -5)
    run_as(board, NO_SPREAD)
    board.start()
    assert scene.settle(scene.roll_out(board, GOOD))["status"] == "FINISHED"
    assert FileTypes(board.url, FILES).identify(ROOT / "demo/fleet.py").label == "python"

    def told() -> bool:
        status = board.status()
        return bool(status["trust"]["anchored"]) and status["certificate"]["error_code"] is None

    wait_for("an anchor and a certificate over the broker", told, timeout_s=60, log=board.log)
    assert "not reachable over HTTP" in log_of(board)
    scene.fleet.broker.kill()
    scene.fleet.controller.kill()
    scene.fleet.start_broker()
    scene.fleet.start_controller()
    assert scene.settle(scene.roll_out(board, NEXT), timeout_s=120)["status"] == "FINISHED"
    rows = scene.fleet.delivered(board)
    assert rows
    assert all(row.exact for row in rows)
    board.agent.stop()


@pytest.mark.parametrize("source", ["http", "mqtt"])
def test_one_way_alone_where_it_was_chosen(scene: Scene, source: str) -> None:
    board = scene.board(f"edge-only-{source}")
    board.config.write_text(f'{board.config.read_text()}[registry]\nsource = "{source}"\n')
    board.start()
    assert scene.settle(scene.roll_out(board, GOOD))["status"] == "FINISHED"
    board.agent.stop()
    cut_off(board)
    board.start()
    rollout = scene.roll_out(board, NEXT)
    if source == "mqtt":
        assert scene.settle(rollout)["status"] == "FINISHED"
    else:
        wait_for(
            "the board to wait",
            lambda: board.alias(FILES).get("error_code") == "source.unreachable",
            timeout_s=60,
            log=board.log,
        )
        scene.fleet.garrison("rollout", "stop", rollout, who="rolf")
    board.agent.stop()
