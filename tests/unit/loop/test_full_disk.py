"""A whole board on a full disk: it starts, serves, and decides; what can be spared is not recorded."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from garrison_agent.api.commands import LoadModel, UnloadModel
from garrison_agent.events import Tick
from garrison_agent.runtimes.status import RequestDone, RequestRecord
from garrison_protocol import topics
from garrison_protocol.errors import InsufficientError
from tests.fakes.full_disk import FullDisk
from tests.unit.loop.rig import DEVICE, Rig, package


@pytest.fixture
def disk(tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """A disk with a board on it that serves one model; it is not full yet."""
    full = FullDisk(rig.config.database_path, monkeypatch)
    rig.free_bytes = full.free_bytes
    rig.restart()
    rig.deploy(package(), "r1")
    assert rig.models.running == ["chat:1.0"]
    return full


def outcome(answer: Future[object]) -> object:
    result = answer.result(0)
    assert isinstance(result, dict)
    return result["outcome"]


def since(rig: Rig, before: list[str]) -> list[str]:
    return rig.audit()[len(before) :]


def samples(rig: Rig) -> int:
    (count,) = rig.database.connection.execute("SELECT count(*) FROM entry WHERE kind = 'sample'").fetchone()
    return int(count)


def test_it_starts_and_serves(rig: Rig, disk: FullDisk) -> None:
    disk.fill()
    for told in (["disk.ballast_released"], []):  # the second time without a ballast, of which all is said
        before = rig.models.started[:]
        rig.restart()
        assert rig.models.running == ["chat:1.0"]
        assert len(rig.models.started) == len(before) + 1
        audit = rig.audit()
        audit = audit[len(audit) - audit[::-1].index("agent.started") :]
        assert [kind for kind in audit if kind != "metadata.refreshed"] == [*told, "model.loaded"]
    rig.stop()
    assert rig.models.running == []


def test_it_decides_while_it_runs(rig: Rig, disk: FullDisk) -> None:
    before = rig.audit()
    disk.fill()
    assert outcome(rig.ask(UnloadModel("chat"))) == "unloaded"
    assert outcome(rig.ask(LoadModel("chat"))) == "loaded"
    assert sorted(since(rig, before)) == [
        "api.load",
        "api.unload",
        "disk.ballast_released",
        "model.loaded",
        "model.unloaded",
    ]


def test_what_can_be_spared_leaves_the_ballast_alone_and_is_dropped(rig: Rig, disk: FullDisk) -> None:
    before, sampled = rig.audit(), samples(rig)
    disk.fill()
    worker = rig.models.worker("chat:1.0")
    for _ in range(3):
        rig.inbox.put(Tick.SAMPLE)
        worker.say(RequestDone(RequestRecord("chat", ok=True)))
        rig.receive(topics.down(DEVICE, topics.Down.DESIRED), b"a stranger's")
        rig.forward(2)
    assert (since(rig, before), samples(rig)) == ([], sampled)
    assert rig.database.ballast.held
    assert rig.models.running == ["chat:1.0"]


def test_an_hour_without_a_decision_leaves_the_ballast_alone(rig: Rig, disk: FullDisk) -> None:
    before = rig.audit()
    disk.fill()
    for _ in range(6):
        rig.forward(600)
        for tick in (Tick.THIN, Tick.HEARTBEAT, Tick.REFRESH):
            rig.inbox.put(tick)
        rig.settle()
    assert since(rig, before) == []
    assert rig.database.ballast.held


def test_the_ballast_comes_back_with_the_room(rig: Rig, disk: FullDisk) -> None:
    disk.fill()
    rig.ask(UnloadModel("chat"))
    before, sampled = rig.audit(), samples(rig)
    rig.inbox.put(Tick.THIN)
    rig.settle()
    assert since(rig, before) == []
    disk.free()
    rig.inbox.put(Tick.THIN)
    rig.inbox.put(Tick.SAMPLE)
    rig.settle()
    assert since(rig, before) == ["disk.ballast_restored"]
    assert (rig.database.ballast.held, samples(rig)) == (True, sampled + 1)


def test_it_comes_back_at_a_start_too(rig: Rig, disk: FullDisk) -> None:
    disk.fill()
    rig.ask(UnloadModel("chat"))
    disk.free()
    rig.restart()
    assert "disk.ballast_restored" in rig.audit()
    assert rig.database.ballast.held


def test_a_process_that_ended_for_want_of_room_finds_it_when_it_starts_again(rig: Rig, disk: FullDisk) -> None:
    disk.told = False
    disk.fill()
    answer = rig.ask(UnloadModel("chat"))
    with pytest.raises(InsufficientError, match=r"disk\.full"):
        answer.result(0)
    rig.restart()
    assert rig.models.running == ["chat:1.0"]
    assert outcome(rig.ask(UnloadModel("chat"))) == "unloaded"
