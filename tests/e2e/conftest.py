"""One real broker and controller for all end-to-end tests; each test enrols boards of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.fleet import Board, Fleet
from demo.packages import DRAFTS, magika_file, pack
from demo.processes import wait_for
from demo.steps import FILES, PEOPLE

GOOD, NEXT, FAILING = "1.0.0", "1.1.0", "1.2.0"


class Scene:
    """A running fleet with three versions of a small model: two good ones, and one that no board's gate passes."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._rollouts = 0

    def board(self, name: str) -> Board:
        """Return a new enrolled board, not started."""
        board = Board(self.fleet, name)
        self.fleet.boards.append(board)
        board.configure()
        token = self.fleet.json("device", "token", "create", name, "--group", "/e2e/", who="dora")
        board.enrol(token["enrolment"])
        return board

    def roll_out(self, board: Board, version: str, *, soak: str = "1s") -> str:
        """Create and approve a rollout of the small model to one board, and return its name."""
        self._rollouts += 1
        name = f"to-{board.name}-{self._rollouts}"
        words = ["rollout", "create", name, "--model", FILES, "--version", version]
        words += ["--filter", f"name={board.name}", "--group", "all=*", "--soak", soak]
        self.fleet.garrison(*words, "--success-threshold", "100", "--error-threshold", "0", who="rolf")
        self.fleet.garrison("rollout", "approve", name, who="anna")
        return name

    def rollout(self, name: str) -> dict[str, Any]:
        """Return what the controller says of a rollout."""
        return dict(self.fleet.json("rollout", "show", name, who="anna"))

    def boards(self, rollout: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the boards of a rollout, of all groups."""
        return [board for group in rollout["groups"] for board in group["boards"]]

    def settle(self, name: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """Return the rollout once it has ended or paused."""
        ended = {"FINISHED", "PAUSED", "STOPPED"}
        wait_for(f"rollout {name}", lambda: self.rollout(name)["status"] in ended, timeout_s=timeout_s)
        return self.rollout(name)


def failing_draft(folder: Path) -> Path:
    """Write a manifest draft whose gate asks for labels that the model never gives."""
    draft = json.loads((DRAFTS / f"{FILES}.json").read_text())
    for case in draft["evaluation"]["cases"]:
        case["expected_index"] = (case["expected_index"] + 1) % 200
    draft["version"] = FAILING
    file = folder / "failing.json"
    file.write_text(json.dumps(draft))
    return file


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The running fleet."""
    fleet = Fleet(tmp_path_factory.mktemp("e2e"), [])
    try:
        fleet.bring_up(PEOPLE, publisher="piet")
        for version in (GOOD, NEXT):
            fleet.publish(pack(fleet, FILES, magika_file(), version=version, path="model.onnx"), who="piet")
        draft = failing_draft(fleet.folder)
        package = fleet.folder / "packages" / "failing"
        file = f"model.onnx={magika_file()}"
        fleet.garrison("model", "pack", "--manifest", str(draft), "--file", file, "--out", str(package))
        fleet.publish(package, who="piet")
        yield Scene(fleet)
    finally:
        fleet.stop()
