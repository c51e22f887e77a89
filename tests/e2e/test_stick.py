"""A board that nothing reaches but a stick: a model comes in, its record goes home, receipts come back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.evidence import compare, heads
from demo.fleet import Board, Fleet
from demo.processes import free_port, wait_for
from demo.steps import FILES
from tests.e2e.conftest import GOOD, NEXT, Scene

pytestmark = pytest.mark.e2e


@pytest.fixture
def board(scene: Scene) -> Iterator[Board]:
    """An enrolled board from which broker and controller cannot be reached."""
    board = scene.board("afloat")
    record = board.state / "identity" / "device.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"url": f"https://127.0.0.1:{free_port()}", "mqtt_port": free_port()}))
    board.start()
    yield board
    board.agent.stop()


def send_out(fleet: Fleet, board: Board, stick: Path) -> dict[str, Any]:
    words = ["registry", "export", "--bundle", str(stick), "--devices", f"name={board.name}", "--valid-days", "20"]
    return dict(fleet.json(*words, who="rolf"))


def bring_home(fleet: Fleet, board: Board, stick: Path) -> dict[str, Any]:
    """Export on the board, import at the controller; return what the controller says of this board."""
    board.run("export", str(stick))
    (answer,) = fleet.json("registry", "import", str(stick), who="rolf")["devices"]
    assert answer["device"] == board.name
    return dict(answer)


def outcomes(imported: dict[str, Any]) -> dict[str, str]:
    return {item["what"]: item["outcome"] for item in imported["items"]}


def wait_for_desired(fleet: Fleet, board: Board, version: str) -> None:
    def signed() -> bool:
        with sqlite3.connect(f"file:{fleet.database}?mode=ro", uri=True) as store:
            row = store.execute("SELECT body FROM desired_state WHERE device_id = ?", (board.name,)).fetchone()
        return row is not None and f'"version":"{version}"' in bytes(row[0]).decode()

    wait_for(f"a desired state with {version}", signed, timeout_s=30)


def test_a_model_comes_by_stick_and_its_record_goes_home(scene: Scene, board: Board, tmp_path: Path) -> None:
    fleet, stick = scene.fleet, tmp_path / "stick"
    first = bring_home(fleet, board, stick)
    assert first["refused"] == 0
    assert first["new"] >= 3

    rollout = scene.roll_out(board, GOOD)
    wait_for_desired(fleet, board, GOOD)
    exported = send_out(fleet, board, stick)
    assert exported["copied"] == exported["blobs"] > 0

    imported = board.run("import", str(stick), "--wait", "120")
    came = outcomes(imported)
    came.pop("receipt telemetry", None)  # whether there was a sample yet is up to the clock
    assert came == {"metadata": "new", "anchor": "new", "desired": "new", "receipt audit": "new"}
    assert board.alias(FILES)["state"] == "ACTIVE"
    assert board.alias(FILES)["loaded"]
    assert board.status()["connected"] is False

    again = board.run("import", str(stick))
    assert outcomes(again)["metadata"] == "unchanged"
    assert outcomes(again)["desired"] == "unchanged"
    assert outcomes(again)["anchor"] == "older"

    home = bring_home(fleet, board, stick)
    assert home["refused"] == 0
    assert scene.settle(rollout)["status"] == "FINISHED"
    repeated = fleet.json("registry", "import", str(stick), who="rolf")["devices"][0]
    assert (repeated["new"], repeated["refused"]) == (0, 0)
    device = fleet.json("device", "show", board.name, who="dora")
    assert device["online"] is False

    marks = heads(board.database)
    epoch, newest = marks["audit"]
    bring_home(fleet, board, stick)
    exported = send_out(fleet, board, stick)
    assert exported["copied"] == 0  # every blob was on the stick
    assert outcomes(board.run("import", str(stick)))["receipt audit"] == "new"
    outbox = board.status()["outbox"]["audit"]
    assert outbox["epoch"] == epoch
    assert outbox["acked"] >= newest
    assert all(one.exact for one in compare(board.name, board.database, fleet.database, marks))


def test_an_older_stick_changes_nothing_and_says_so(scene: Scene, tmp_path: Path) -> None:
    fleet = scene.fleet
    board = scene.board("ashore")
    board.start()
    try:
        old, new = tmp_path / "old", tmp_path / "new"
        scene.settle(scene.roll_out(board, GOOD))
        send_out(fleet, board, old)
        scene.settle(scene.roll_out(board, NEXT))
        send_out(fleet, board, new)
        before = board.status()
        assert outcomes(board.run("import", str(new)))["desired"] == "unchanged"
        assert outcomes(board.run("import", str(old)))["desired"] == "older"
        after = board.status()
        assert after["desired"] == before["desired"]
        assert board.alias(FILES)["version"] == NEXT
    finally:
        board.agent.stop()
