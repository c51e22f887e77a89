"""The agent is killed after every single save; whatever it had begun, the right model serves in the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from garrison_agent.core.slot import Phase, Served, Withdraw
from garrison_protocol.manifest import PackageRef
from garrison_protocol.states import DeploymentState as State
from tests.unit.core.slots import NEW, OLD, THIRD, Board, KilledError, World, entry

Story = Callable[[Board], None]


def first(board: Board) -> None:
    board.assign(entry(NEW, "r2"))
    board.settle()


def update(board: Board) -> None:
    board.assign(entry(OLD, "r1"))
    board.settle()
    board.assign(entry(NEW, "r2"))
    board.settle()


def superseded(board: Board) -> None:
    board.assign(entry(OLD, "r1"))
    board.settle()
    board.assign(entry(NEW, "r2"))
    for _ in range(5):
        board.deliver(board.queue.pop(0))
    board.assign(entry(THIRD, "r3"))
    board.settle()


def corrupted(board: Board) -> None:
    board.assign(entry(NEW, "r2"))
    board.settle()
    board.world.corrupt.add(NEW)
    board.restart()
    board.settle()


def removed(board: Board) -> None:
    board.assign(entry(NEW, "r2"))
    board.settle()
    board.deliver(Withdraw())
    board.settle()


STORIES: list[tuple[str, Story, World, State, PackageRef | None]] = [
    ("first", first, World(), State.ACTIVE, NEW),
    ("first, refused by the gate", first, World(bad={NEW}), State.ROLLED_BACK, None),
    ("update beside", update, World(), State.ACTIVE, NEW),
    ("update instead", update, World(room_beside=False), State.ACTIVE, NEW),
    ("bad update beside", update, World(bad={NEW}), State.ROLLED_BACK, OLD),
    ("bad update instead", update, World(bad={NEW}, room_beside=False), State.ROLLED_BACK, OLD),
    ("update that dies in the soak", update, World(dying={NEW}), State.ROLLED_BACK, OLD),
    ("unsuitable update", update, World(unsuitable={NEW}), State.REJECTED, OLD),
    ("superseded", superseded, World(), State.ACTIVE, THIRD),
    ("superseded instead", superseded, World(room_beside=False), State.ACTIVE, THIRD),
    ("corrupted", corrupted, World(), State.ACTIVE, NEW),
    ("removed", removed, World(), State.REMOVED, None),
]


def copy(world: World) -> World:
    return World(
        set(world.corrupt), set(world.bad), set(world.dying), set(world.unsuitable), world.offline, world.room_beside
    )


@pytest.mark.parametrize(
    ("story", "world", "state", "serving"), [one[1:] for one in STORIES], ids=[s[0] for s in STORIES]
)
def test_killed_after_every_save(story: Story, world: World, state: State, serving: PackageRef | None) -> None:
    undisturbed = Board(copy(world))
    story(undisturbed)
    assert_ends(undisturbed, state, serving)
    for crash_at in range(1, undisturbed.saves + 1):
        board = Board(copy(world))
        board.crash_at = crash_at
        with pytest.raises(KilledError):
            story(board)
        board.restart()
        board.settle()
        finish(board, story)
        assert_ends(board, state, serving)


def finish(board: Board, story: Story) -> None:
    """Give what the story still had to say: desired state is level-triggered, so the newest is repeated."""
    if story is update:
        board.assign(entry(NEW, "r2"))
    elif story is superseded:
        board.assign(entry(THIRD, "r3"))
    elif story is removed:
        board.deliver(Withdraw())
    elif story is corrupted and NEW not in board.world.corrupt and "model.corrupt" not in board.kinds:
        board.world.corrupt.add(NEW)
        board.restart()
    board.settle()


def assert_ends(board: Board, state: State, serving: PackageRef | None) -> None:
    slot = board.slot
    assert slot.state is state, board.history
    assert (slot.serving.package if slot.serving else None) == serving
    assert board.workers == ({serving} if serving else set())
    assert slot.phase is (Phase.READY if serving else Phase.OFF)


def test_offline_restart_serves_from_disk() -> None:
    board = Board(World())
    first(board)
    board.world.offline = True
    board.restart()
    board.settle()
    assert_ends(board, State.ACTIVE, NEW)


def test_offline_restart_in_mid_download_keeps_the_old_one_serving() -> None:
    board = Board(World())
    board.assign(entry(OLD, "r1"))
    board.settle()
    board.world.offline = True
    board.assign(entry(NEW, "r2"))
    board.deliver(board.queue.pop(0))
    board.restart()
    while board.queue:
        board.deliver(board.queue.pop(0))
    assert board.slot.state is State.WAITING
    assert board.workers == {OLD}


def test_a_candidate_that_kills_the_agent_is_given_up() -> None:
    board = Board(World(room_beside=False))
    board.assign(entry(OLD, "r1"))
    board.settle()
    board.assign(entry(NEW, "r2"))
    while board.slot.state is not State.LOADING:
        board.deliver(board.queue.pop(0))
    for _ in range(3):
        board.restart()
        assert board.slot.state.value == "LOADING"
    board.restart()
    assert board.slot.state.value == "ROLLING_BACK"
    assert board.slot.error_code == "deployment.crash_loop"
    board.settle()
    assert_ends(board, State.ROLLED_BACK, OLD)


def test_power_cuts_pause_the_soak_and_do_not_blame_the_model() -> None:
    board = Board(World())
    board.assign(entry(NEW, "r2", soak_s=1000))
    while board.slot.state is not State.SOAKING or board.slot.soaked_s < 65:
        if board.queue:
            board.deliver(board.queue.pop(0))
        else:
            board.deliver(Served(5.0))
    for _ in range(8):
        soaked = board.slot.soaked_s
        board.restart()
        assert board.slot.soaked_s == soaked
        while board.queue:
            board.deliver(board.queue.pop(0))
        for _ in range(13):
            board.deliver(Served(5.0))
        assert board.slot.state is State.SOAKING
    board.settle()
    assert_ends(board, State.ACTIVE, NEW)
