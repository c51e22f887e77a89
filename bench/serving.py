"""A board with models in service, brought there as an operator would: packed, signed, published, rolled out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.fleet import Board, Fleet
from demo.packages import magika_file, pack, smollm2_file
from demo.processes import wait_for

TEXT = "smollm2"
FILES = "magika"
PEOPLE = {
    "dora": ["device-admin", "viewer"],
    "piet": ["model-publisher", "viewer"],
    "rolf": ["release-manager", "viewer"],
    "anna": ["approver", "viewer"],
}


@contextmanager
def serving_board(folder: Path, *aliases: str, threads: int, parallel: int) -> Iterator[Board]:
    """Give a board that serves ``aliases`` (``TEXT``, ``FILES``); end every process afterwards.

    ``threads`` and ``parallel`` are the board's own settings of its workers. The rest is at its default. Broker and
    controller are stopped before the board is given, so that nothing else of ours runs beside it.

    Raises:
        StepError: Something did not start, or a model did not come into service.
    """
    folder.mkdir(parents=True)
    fleet = Fleet(folder, ("edge-1",))
    board = fleet.boards[0]
    try:
        fleet.bring_up(PEOPLE, publisher="piet")
        board.folder.mkdir(parents=True)
        board.config.write_text(
            f'state_dir = "{board.state}"\nruntime_dir = "{board.runtime}"\n'
            f'[api]\nhost = "127.0.0.1"\nport = {board.port}\n'
            f"[runtime]\nthreads = {threads}\nparallel = {parallel}\n"
        )
        token = fleet.json("device", "token", "create", board.name, "--group", "/bench/", who="dora")
        board.enrol(token["enrolment"])
        board.start()
        for alias in aliases:
            _bring_into_service(fleet, board, alias)
        fleet.controller.stop()
        fleet.broker.stop()
        yield board
    finally:
        fleet.stop()


def worker_pids(board: Board) -> list[int]:
    """Return the process ids of the board's workers."""
    children = Path(f"/proc/{board.agent.pid}/task").glob("*/children")
    pids = [int(word) for child in children for word in child.read_text().split()]
    return [pid for pid in pids if b"runtimes.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _bring_into_service(fleet: Fleet, board: Board, alias: str) -> None:
    file, path = (smollm2_file(), "model.gguf") if alias == TEXT else (magika_file(), "model.onnx")
    fleet.publish(pack(fleet, alias, file, path=path), who="piet")
    names = {one["alias"]: one["name"] for one in fleet.json("model", "list", who="anna")["models"]}
    words = ["rollout", "create", alias, "--model", names[alias], "--version", "1.0.0", "--group", "all=*"]
    fleet.garrison(*words, "--soak", "1s", "--success-threshold", "100", "--error-threshold", "0", who="rolf")
    fleet.garrison("rollout", "approve", alias, who="anna")
    wait_for(
        f"{alias} in service",
        lambda: board.alias(alias).get("state") == "ACTIVE" and bool(board.alias(alias).get("loaded")),
        timeout_s=240,
        log=board.log,
        alive=[board.agent],
    )
