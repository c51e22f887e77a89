"""Desired state changes, crashes, and damage in any order: the machine has a row for all of it and comes to rest."""

from __future__ import annotations

from random import Random

import pytest

from garrison_agent.core.slot import (
    Event,
    LeaseEnded,
    LeaseRenewed,
    LoadWanted,
    Nudged,
    Phase,
    Served,
    UnloadWanted,
    Withdraw,
)
from garrison_protocol.states import DeploymentState as State
from tests.unit.core.slots import NEW, OLD, THIRD, Board, World, entry


@pytest.mark.parametrize("seed", range(150))
def test_any_order_of_events_converges(seed: int) -> None:
    chance = Random(seed)
    board = Board(World(room_beside=chance.random() < 0.5))
    rollouts = 0
    board.assign(entry(OLD, "r0"))
    for _ in range(120):
        match chance.randrange(12):
            case 0:
                rollouts += 1
                board.assign(entry(chance.choice([OLD, NEW, THIRD]), f"r{rollouts}", loaded=chance.random() < 0.8))
            case 1:
                wishes: list[Event] = [Withdraw(), Nudged(), LoadWanted(), UnloadWanted()]
                board.deliver(chance.choice(wishes))
            case 2:
                board.restart()
            case 3:
                board.world.bad = set(chance.sample([OLD, NEW, THIRD], chance.randrange(3)))
            case 4:
                board.world.corrupt.add(chance.choice([OLD, NEW, THIRD]))
            case 5:
                board.world.offline = not board.world.offline
            case 6 if board.slot.phase is Phase.READY:
                board.deliver(Served(5.0))
            case 7 if board.timers:
                board.deliver(board.timers.pop(0))
            case _ if board.queue:
                board.deliver(board.queue.pop(0))
    board.world.offline = False
    board.world.bad.clear()
    board.world.corrupt.clear()
    board.assign(entry(THIRD, "last"))
    board.settle()
    assert board.slot.state is State.ACTIVE, board.history[-20:]
    assert board.workers == {THIRD}
    assert board.slot.phase is Phase.READY


@pytest.mark.parametrize("seed", range(150))
def test_leases_that_end_and_begin_in_any_order_load_nothing_that_may_not_serve(seed: int) -> None:
    chance = Random(seed)
    board = Board(World(room_beside=chance.random() < 0.5))
    rollouts = 0
    board.assign(entry(OLD, "r0"))
    for _ in range(120):
        serving = board.slot.serving
        match chance.randrange(11):
            case 0:
                rollouts += 1
                board.assign(entry(chance.choice([OLD, NEW, THIRD]), f"r{rollouts}", loaded=chance.random() < 0.8))
            case 1:
                wishes: list[Event] = [Withdraw(), Nudged(), LoadWanted(), UnloadWanted()]
                board.deliver(chance.choice(wishes))
            case 2:
                board.restart()
            case 3:
                board.world.bad = set(chance.sample([OLD, NEW, THIRD], chance.randrange(3)))
            case 4:
                board.world.corrupt.add(chance.choice([OLD, NEW, THIRD]))
            case 5 if board.timers:
                board.deliver(board.timers.pop(0))
            case 6 if serving is not None and board.slot.lease_ended:
                board.deliver(LeaseRenewed(serving.package))
            case 7 if serving is not None and not board.slot.lease_ended:
                board.deliver(LeaseEnded(serving.package, stops=chance.random() < 0.7, fresh_at_s=1.0))
            case _ if board.queue:
                board.deliver(board.queue.pop(0))
        if board.slot.barred:
            assert board.slot.phase in (Phase.OFF, Phase.REPAIRING)
            assert board.slot.serving is not None
            assert board.slot.serving.package not in board.workers
        assert len(board.workers) <= 1 + board.world.room_beside
