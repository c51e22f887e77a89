"""A worker that has requests and does not get on with them is ended; an idle board is never woken for it."""

from __future__ import annotations

from pathlib import Path

from garrison_agent.core.slot import Phase
from tests.unit.loop.rig import Rig, package

TIMEOUT_S = 120.0


def begin(rig: Rig) -> Path:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    socket = rig.models.worker("chat:1.0").spec.socket
    assert rig.parts.traffic.enter(socket)
    rig.settle()
    return socket


def test_a_hung_worker_is_ended_and_started_again(rig: Rig) -> None:
    socket = begin(rig)
    rig.work.healths[socket.name] = {"active": 1, "queued": 0, "steps": 7}
    rig.forward(TIMEOUT_S + 60)
    assert [one["code"] for one in rig.headers("model.crashed")] == ["worker.stalled"]
    assert rig.slot.failure is not None
    assert "did not get on with them for 120 s" in rig.slot.failure.message
    assert rig.slot.phase is Phase.READY
    assert rig.models.worker("chat:1.0").spec.socket != socket


def test_one_that_does_not_even_answer_is_too(rig: Rig) -> None:
    begin(rig)
    rig.forward(TIMEOUT_S + 60)
    assert [one["code"] for one in rig.headers("model.crashed")] == ["worker.stalled"]


def test_a_slow_one_is_left_alone(rig: Rig) -> None:
    socket = begin(rig)
    for steps in range(100):
        rig.work.healths[socket.name] = {"active": 1, "queued": 0, "steps": steps}
        rig.forward(TIMEOUT_S / 2)
    assert rig.headers("model.crashed") == []


def test_one_that_has_moved_since_the_last_look_is_left_alone(rig: Rig) -> None:
    socket = begin(rig)
    rig.work.healths[socket.name] = {"active": 1, "queued": 0, "steps": 7}
    rig.forward(TIMEOUT_S + 25)  # first asked after 30 s
    rig.work.healths[socket.name] = {"active": 1, "queued": 0, "steps": 8}
    rig.forward(30)
    assert rig.headers("model.crashed") == []


def test_a_long_run_that_its_worker_allows_is_none(rig: Rig) -> None:
    socket = begin(rig)
    rig.work.healths[socket.name] = {"active": 1, "queued": 0, "runs": 7, "step_timeout_s": 600}
    rig.forward(590)
    assert rig.headers("model.crashed") == []
    rig.forward(100)
    assert [one["code"] for one in rig.headers("model.crashed")] == ["worker.stalled"]
    assert rig.slot.failure is not None
    assert "for 600 s" in rig.slot.failure.message


def test_one_whose_clients_are_slow_is_left_alone(rig: Rig) -> None:
    socket = begin(rig)
    rig.work.healths[socket.name] = {"active": 0, "queued": 0, "steps": 7}
    rig.forward(10 * TIMEOUT_S)
    assert rig.headers("model.crashed") == []


def test_nobody_is_asked_while_nothing_is_in_flight(rig: Rig) -> None:
    socket = begin(rig)
    rig.parts.traffic.leave(socket)
    rig.forward(TIMEOUT_S)
    asked = rig.work.log.count(f"health {socket.name}")
    assert asked <= 1
    rig.forward(100 * TIMEOUT_S)
    assert rig.work.log.count(f"health {socket.name}") == asked
    assert rig.headers("model.crashed") == []
    assert rig.parts.traffic.enter(socket)
    rig.settle()
    rig.forward(TIMEOUT_S / 2)  # the time before did not count
    assert rig.headers("model.crashed") == []
