"""The smallest real fleet: broker, controller, and one enrolled board without a model, as separate processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.fleet import Board, Fleet

PEOPLE = {"dora": ["device-admin", "viewer"], "piet": ["model-publisher", "viewer"]}


@contextmanager
def one_board(folder: Path) -> Iterator[tuple[Fleet, Board]]:
    """Give a fleet whose board is enrolled and not started; end every process afterwards.

    Raises:
        StepError: Something did not start.
    """
    folder.mkdir(parents=True)
    fleet = Fleet(folder, ("edge-1",))
    board = fleet.boards[0]
    try:
        fleet.bring_up(PEOPLE, publisher="piet")
        configure(board)
        token = fleet.json("device", "token", "create", board.name, "--group", "/bench/", who="dora")
        board.enrol(token["enrolment"])
        yield fleet, board
    finally:
        fleet.stop()


def configure(board: Board) -> None:
    """Write a configuration that leaves every interval at its default, unlike the demo's."""
    board.folder.mkdir(parents=True, exist_ok=True)
    board.config.write_text(
        f'state_dir = "{board.state}"\nruntime_dir = "{board.runtime}"\n'
        f'[api]\nhost = "127.0.0.1"\nport = {board.port}\n'
    )
