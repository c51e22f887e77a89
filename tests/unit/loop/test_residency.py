"""What stays in memory on a whole board: on-demand loading, eviction, keep-alive, pinning, measured sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from garrison_agent.adapters.slots import SlotStore
from garrison_agent.api.commands import (
    Doctor,
    GetStatus,
    ListLoaded,
    LoadModel,
    SetKeepAlive,
    UnloadModel,
)
from garrison_agent.config import AgentConfig
from garrison_agent.core.residency import MIN_TURN_S
from garrison_agent.core.retry import GIVEN_UP_S
from garrison_agent.core.service import MAX_FAILURES
from garrison_agent.core.slot import Phase
from garrison_agent.events import Tick
from garrison_agent.owner.residency import HOLD_S
from garrison_agent.owner.workers import DRAIN_S, STOP_GRACE_S
from garrison_agent.runtimes.status import Exited, Ready, RequestDone, RequestRecord
from garrison_protocol.errors import InsufficientError, NotFoundError, UnavailableError
from garrison_protocol.states import DeploymentState as State
from tests.fakes.board_ports import FakeWorker
from tests.unit.loop.rig import Rig, entry, package

REFUSED = InsufficientError


class Board:
    """A rig with models ``a``, ``b``, ... of given sizes, which were put into service one after the other."""

    def __init__(self, folder: Path, **runtime: object) -> None:
        self.rig = Rig(folder)
        self.rig.kill()
        config = self.rig.config.model_dump()
        config["runtime"].update(runtime)
        self.rig.config = AgentConfig.model_validate(config)
        self.rig.start()
        self.rig.connect()
        self.entries: dict[str, Any] = {}

    def serve(self, alias: str, memory_mb: int) -> None:
        made = package("1.0", name=alias, memory_mb=memory_mb)
        self.rig.work.publish(made)
        self.entries[alias] = entry(made.ref, alias=alias)
        self.rig.desire(*self.entries.values())
        self.rig.settle()
        self.rig.forward(10)

    def socket(self, alias: str) -> Path:
        return self.worker(alias).spec.socket

    def worker(self, alias: str) -> FakeWorker:
        return self.rig.models.worker(f"{alias}:1.0")

    def begin(self, alias: str) -> Path:
        """Let a request to the model begin."""
        socket = self.socket(alias)
        assert self.rig.parts.traffic.enter(socket)
        self.rig.settle()
        return socket

    def end(self, socket: Path) -> None:
        self.rig.parts.traffic.leave(socket)
        self.rig.settle()

    def request(self, alias: str) -> None:
        self.end(self.begin(alias))

    @property
    def running(self) -> list[str]:
        return [one.removesuffix(":1.0") for one in self.rig.models.running]

    def load(self, alias: str, keep_alive_s: float | None = None, *, waits: bool = False) -> Any:
        return self.rig.ask(LoadModel(alias, keep_alive_s, waits)).result(0)

    def loaded(self) -> Any:
        return self.rig.ask(ListLoaded()).result(0)

    def reasons(self) -> list[object]:
        return [one["reason"] for one in self.rig.headers("model.unloaded")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "workers").mkdir(parents=True)
    return tmp_path


def test_a_model_that_is_wanted_sends_the_least_recently_used_away(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 400)
    board.serve("b", 400)
    board.rig.ask(UnloadModel("b")).result(0)
    board.serve("c", 400)
    board.request("a")
    board.rig.forward(60)
    board.request("c")
    board.rig.forward(60)
    assert board.load("b")["outcome"] == "loaded"
    assert board.running == ["b", "c"]
    assert board.reasons() == ["operator", "evicted"]


def test_both_are_never_in_memory_at_once(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 600)
    lingering = board.worker("b")
    lingering.lingers = True
    answer = board.rig.ask(LoadModel("a"))
    assert not answer.done()
    assert board.running == ["b"]
    lingering.die(0)
    board.rig.settle()
    assert answer.done()
    assert board.running == ["a"]


def test_who_comes_after_one_that_ends_its_answers_waits_where_both_do_not_fit(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 600)
    ending = board.worker("a")
    ending.lingers = True
    socket = board.begin("a")
    unload = board.rig.ask(UnloadModel("a"))
    load = board.rig.ask(LoadModel("a"))
    assert board.running == ["a"]
    board.end(socket)
    ending.die(0)
    board.rig.settle()
    assert unload.done()
    assert load.result(0) == {"id": "a:1.0", "alias": "a", "outcome": "loaded"}
    assert board.running == ["a"]


@pytest.mark.parametrize(("memory_mb", "fits"), [(600, False), (300, True)])
def test_a_rollback_hurries_answers_that_stand_in_its_way(folder: Path, memory_mb: int, fits: bool) -> None:
    board = Board(folder)
    board.serve("a", memory_mb)
    old = board.worker("a")
    old.lingers = True
    board.begin("a")
    new = package("2.0", name="a", memory_mb=300)
    board.rig.work.publish(new)
    board.rig.desire(entry(new.ref, alias="a", rollout="r2", soak_s=600))
    board.rig.settle()
    assert (board.rig.models.running, old.grace_s) == (["a:1.0", "a:2.0"], DRAIN_S)
    while "a:2.0" in board.rig.models.running:
        board.rig.models.worker("a:2.0").die(-11)
        board.rig.forward(8)
    slot = board.rig.parts.deployments.slots["a"]
    assert (slot.state, old.grace_s) == ((State.ROLLED_BACK, DRAIN_S) if fits else (State.ROLLING_BACK, STOP_GRACE_S))
    old.die(-9)
    board.rig.settle()
    assert board.rig.parts.deployments.slots["a"].state is State.ROLLED_BACK
    assert board.running == ["a"]


def test_a_rollback_leaves_others_their_answers_where_there_is_room(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 600)
    board.serve("b", 100)
    other = board.worker("b")
    other.lingers = True
    board.begin("b")
    board.rig.ask(UnloadModel("b"))
    new = package("2.0", name="a", memory_mb=600)
    board.rig.work.publish(new)
    board.rig.work.verdicts["a:2.0"] = ("gate.failed", "too bad")
    board.rig.models.lingering = True  # the candidate takes its time to end
    board.rig.desire(entry(new.ref, alias="a", rollout="r2"), board.entries["b"])
    board.rig.settle()
    states = [board.rig.parts.deployments.slots["a"].state]
    board.rig.models.worker("a:2.0").die(0)
    board.rig.settle()
    states.append(board.rig.parts.deployments.slots["a"].state)
    assert states == [State.ROLLING_BACK, State.ROLLED_BACK]
    assert (board.running, other.grace_s) == (["a", "b"], DRAIN_S)


def test_a_model_in_use_does_not_leave_and_the_refusal_says_by_how_much(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 700)
    socket = board.begin("b")
    with pytest.raises(REFUSED, match=r"memory\.busy.*300 MiB are missing; would have to go: b \(in use\)") as caught:
        board.load("a")
    assert (caught.value.retryable, caught.value.fields["missing_mb"]) == (True, 300)
    assert board.running == ["b"]
    board.end(socket)
    board.load("a")
    assert board.running == ["a"]


def test_a_model_that_always_has_requests_makes_way_for_one_that_somebody_waits_for(folder: Path) -> None:
    board = Board(folder)
    traffic = board.rig.parts.traffic
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 700)
    socket = board.begin("b")
    with pytest.raises(REFUSED, match=r"memory\.busy"):
        board.load("a")
    assert traffic.held_s(socket) == 0  # an operator who only tries holds nobody up
    with pytest.raises(REFUSED, match=r"memory\.busy"):
        board.load("a", waits=True)
    assert traffic.held_s(socket) == HOLD_S
    board.end(socket)
    assert board.load("a", waits=True)["outcome"] == "loaded"
    assert board.running == ["a"]
    taken = board.begin("a")
    for served_s, held_s in ((1, 0), (MIN_TURN_S, HOLD_S)):  # now b waits for a, which has its turn first
        board.rig.forward(served_s)
        with pytest.raises(REFUSED, match=r"memory\.busy"):
            board.load("b", waits=True)
        assert traffic.held_s(taken) == held_s


def test_models_that_are_asked_for_in_the_very_moment_stay_and_the_decision_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board(folder)
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 400)
    board.serve("c", 400)
    for alias in ("b", "c"):
        board.request(alias)
    tried: list[Path] = []

    def retire(socket: Path) -> bool:
        """A request begins whenever the owner has just decided, and is over when it looks again."""
        assert len(tried) < 10, "the decision goes round in circles"
        tried.append(socket)
        return False

    monkeypatch.setattr(board.rig.parts.traffic, "retire", retire)
    with pytest.raises(REFUSED, match=r"memory\.busy.*\(in use\)"):
        board.load("a")
    assert board.running == ["b", "c"]
    assert len(tried) == 2  # each was tried once


def test_however_often_a_keep_alive_changes_there_is_one_timer_for_it(folder: Path) -> None:
    board = Board(folder, keep_alive_s=1000)
    board.serve("a", 400)
    before = len(board.rig.parts.timers._heap)
    for seconds in range(900, 800, -1):
        board.rig.ask(SetKeepAlive("a", seconds)).result(0)
    assert len(board.rig.parts.timers._heap) <= before + 1
    board.rig.forward(780)
    assert board.running == ["a"]
    board.rig.forward(20)
    assert board.running == []


def test_a_pinned_model_never_leaves(folder: Path) -> None:
    board = Board(folder, pinned=["b"], keep_alive_s=60)
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 700)
    board.rig.forward(100_000)
    assert board.running == ["b"]
    with pytest.raises(REFUSED, match=r"b \(pinned\)"):
        board.load("a")
    (view,) = board.loaded()
    assert (view["pinned"], view["expires_at"]) == (True, None)


def test_a_model_that_just_came_waits_for_its_request(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 600)
    board.load("a")
    with pytest.raises(REFUSED, match=r"memory\.busy"):
        board.load("b")
    board.request("a")
    board.load("b")
    assert board.running == ["b"]


def test_keep_alive_ends_after_the_last_use(folder: Path) -> None:
    board = Board(folder, keep_alive_s=300)
    board.serve("a", 400)
    board.rig.forward(200)
    board.request("a")
    board.rig.forward(299)
    (view,) = board.loaded()
    assert view["expires_at"] - int(board.rig.clock.wall_s) in (0, 1, 2)
    assert board.running == ["a"]
    board.rig.forward(2)
    assert board.running == []
    assert board.reasons() == ["idle"]
    assert board.load("a")["outcome"] == "loaded"


def test_a_long_answer_outlives_its_keep_alive(folder: Path) -> None:
    board = Board(folder, keep_alive_s=60, stall_timeout_s=3600)
    board.serve("a", 400)
    socket = board.begin("a")
    board.rig.forward(3000)
    assert board.running == ["a"]
    board.end(socket)
    board.rig.forward(59)
    assert board.running == ["a"]
    board.rig.forward(2)
    assert board.running == []


def test_by_default_models_stay(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 400)
    board.rig.forward(1_000_000)
    assert board.running == ["a"]


def test_a_request_may_ask_for_another_keep_alive(folder: Path) -> None:
    board = Board(folder, keep_alive_s=60)
    board.serve("a", 400)
    board.rig.ask(SetKeepAlive("a", -1)).result(0)
    board.rig.forward(10_000)
    assert board.running == ["a"]
    board.rig.ask(SetKeepAlive("a:1.0", 0)).result(0)
    assert board.running == []
    board.load("a", 500)
    board.rig.forward(450)
    assert board.running == ["a"]
    board.rig.forward(100)
    assert board.running == []
    board.load("a")  # what was asked for ended with the unload
    board.rig.forward(61)
    assert board.running == []
    with pytest.raises(NotFoundError, match=r"model\.unknown"):
        board.rig.ask(SetKeepAlive("nobody", 1)).result(0)


@pytest.mark.parametrize("keep_alive_s", [1e12, 1e300, 10**400], ids=["31688 years", "a float", "no float"])
def test_longer_than_anybody_waits_is_for_ever(folder: Path, keep_alive_s: float) -> None:
    board = Board(folder, keep_alive_s=60)
    board.serve("a", 400)
    board.load("a", keep_alive_s)
    assert [view["expires_at"] for view in board.loaded()] == [None]
    board.rig.forward(1000)
    assert board.running == ["a"]


def test_zero_unloads_when_the_last_request_has_ended(folder: Path) -> None:
    board = Board(folder, stall_timeout_s=3600)
    board.serve("a", 400)
    one, two = board.begin("a"), board.begin("a")
    board.rig.ask(SetKeepAlive("a", 0)).result(0)
    board.end(one)
    assert board.running == ["a"]
    board.end(two)
    assert board.running == []


def test_no_request_begins_on_a_worker_that_leaves(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 400)
    socket, lingering = board.socket("a"), board.worker("a")
    lingering.stop = lambda grace_s=5.0: None  # type: ignore[method-assign]
    board.rig.ask(SetKeepAlive("a", 0)).result(0)
    assert board.running == ["a"]
    assert not board.rig.parts.traffic.enter(socket)
    route = board.rig.parts.routes.table.find("a")
    assert route is not None
    assert route.socket is None


def test_an_eviction_that_could_not_be_recorded_leaves_the_model_in_service(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board(folder)
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 600)

    def locked(store: object, slot: object) -> None:
        raise UnavailableError("database.locked", "another program writes", retryable=True)

    with monkeypatch.context() as patch:
        patch.setattr(SlotStore, "save", locked)
        with pytest.raises(UnavailableError, match=r"database\.locked"):
            board.load("a")
    assert board.running == ["b"]
    board.request("b")
    board.rig.forward(60)
    board.load("a")
    assert board.running == ["a"]


def test_a_deployment_sends_away_only_what_would_leave_by_itself(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 700)
    board.serve("b", 700)
    assert board.running == ["a"]
    board.rig.ask(SetKeepAlive("a", 3600)).result(0)
    board.rig.forward(2000)
    assert board.running == ["b"]
    assert board.rig.parts.deployments.slots["b"].state is State.ACTIVE
    assert board.rig.parts.deployments.slots["a"].phase is Phase.OFF


def test_a_measured_peak_counts_from_then_on_even_after_a_restart(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 300)
    worker = board.worker("a")
    worker.peak = 650
    worker.say(RequestDone(RequestRecord("chat", True)))
    board.rig.settle()
    board.rig.owner.handle(Tick.SAMPLE)
    status: Any = board.rig.ask(GetStatus()).result(0)
    assert status["aliases"][0]["memory_mb"] == 650
    board.rig.restart()
    board.rig.connect()
    board.serve("b", 400)
    assert board.rig.parts.deployments.slots["b"].state is State.WAITING
    status = board.rig.ask(GetStatus()).result(0)
    assert status["aliases"][0]["memory_mb"] == 650


def test_what_was_measured_does_not_lock_out_what_its_manifest_lets_in(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 900)
    worker = board.worker("a")
    worker.peak = 1100
    worker.say(RequestDone(RequestRecord("chat", True)))
    board.rig.settle()
    board.rig.owner.handle(Tick.SAMPLE)
    board.rig.restart()
    assert board.running == ["a"]


def test_a_restart_puts_no_more_into_memory_than_fits(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 400)
    board.serve("b", 500)
    config = board.rig.config.model_dump()
    config["limits"]["memory_budget_mb"] = 600
    board.rig.config = AgentConfig.model_validate(config)
    board.rig.restart()
    assert board.running == ["a"]
    assert board.rig.parts.deployments.slots["b"].phase is Phase.BACKOFF
    board.rig.forward(3600)
    slot = board.rig.parts.deployments.slots["b"]
    assert slot.phase is not Phase.FAILED  # nothing is wrong with it


def test_who_asks_again_and_again_for_memory_in_use_leaves_no_records(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 400)
    board.serve("b", 500)
    config = board.rig.config.model_dump()
    config["limits"]["memory_budget_mb"] = 600
    board.rig.config = AgentConfig.model_validate(config)
    board.rig.restart()
    socket, before = board.begin("a"), board.rig.audit()
    for _ in range(3):
        with pytest.raises(REFUSED, match=r"memory\.busy") as refused:
            board.load("b")
        assert refused.value.retryable
    assert board.rig.audit() == before
    board.end(socket)
    assert board.load("b")["outcome"] == "loaded"


def test_a_restart_beside_a_candidate_counts_the_candidate_too(folder: Path) -> None:
    board = Board(folder)
    board.serve("b", 400)
    board.rig.ask(UnloadModel("b")).result(0)
    board.serve("a", 300)
    two = package("2.0", name="a", memory_mb=500)
    board.rig.work.publish(two)
    board.rig.models.holding = True
    board.rig.desire(entry(two.ref, "r2", alias="a"), board.entries["b"])
    board.rig.settle()
    assert board.rig.parts.deployments.slots["a"].state is State.LOADING
    worker = board.worker("a")
    worker.alive = False
    worker.say(Exited(-11, "model.crashed", "it ended"))
    board.rig.settle()
    board.rig.ask(LoadModel("b"))  # 500 and 400 of 1000 MiB
    board.rig.settle()
    board.rig.forward(10)
    assert sum(memory_mb for _, _, memory_mb in board.rig.parts.workers.memory_mb()) <= 1000
    slot = board.rig.parts.deployments.slots["a"]
    assert slot.failure is not None
    assert slot.failure.code == "memory.busy"


def test_room_for_a_rollback_is_nobody_elses(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 600)
    two = package("2.0", name="a", memory_mb=500)
    board.rig.work.publish(two)
    board.rig.models.holding = True
    board.rig.desire(entry(two.ref, "r2", alias="a"))
    board.rig.settle()
    assert board.rig.parts.deployments.slots["a"].state is State.LOADING
    other = package("1.0", name="b", memory_mb=450)
    board.rig.work.publish(other)
    board.rig.desire(entry(two.ref, "r2", alias="a"), entry(other.ref, "r3", alias="b"))
    board.rig.settle()
    assert board.rig.parts.deployments.slots["b"].state is State.WAITING


def test_a_model_that_fails_again_and_again_says_why_and_is_left_alone(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 400)
    for _ in range(MAX_FAILURES):
        worker = board.worker("a")
        worker.alive = False
        worker.say(Exited(-9, "worker.out_of_memory", "its worker was ended by the kernel, out of memory"))
        board.rig.forward(20)
    slot = board.rig.parts.deployments.slots["a"]
    assert slot.phase is Phase.FAILED
    status: Any = board.rig.ask(GetStatus()).result(0)
    (alias,) = status["aliases"]
    assert alias["worker"] == "failed"
    assert alias["worker_failure"].startswith("worker.out_of_memory: ")
    assert "it had taken up to 400 MiB" in alias["worker_failure"]
    checks: Any = board.rig.ask(Doctor()).result(0)
    (check,) = [one for one in checks if one["name"] == "model a"]
    assert check["outcome"] == "fail"
    assert "worker.out_of_memory" in check["detail"]
    assert "garrison-agent model load a" in check["fix"]
    route = board.rig.parts.routes.table.find("a")
    assert route is not None
    assert "out of memory" in str(route.failure)
    assert "alarm.model_failed" in board.rig.audit()
    started = len(board.rig.models.started)
    board.rig.forward(1700)
    assert len(board.rig.models.started) == started
    assert board.load("a")["outcome"] == "loaded"
    route = board.rig.parts.routes.table.find("a")
    assert route is not None
    assert route.failure is None


def test_facts_of_the_engine_are_learnt(folder: Path) -> None:
    board = Board(folder)
    board.rig.models.holding = True
    board.serve("a", 400)
    worker = board.worker("a")
    worker.peak = 350
    worker.say(Ready(480.0, 340.0, {"kv_bytes_per_token": 23_040}))
    board.rig.settle()
    package_ = board.rig.parts.deployments.slots["a"].package
    text = board.rig.database.get("memory.measured")
    assert text is not None
    assert package_.manifest_sha256 in text
    assert '"kv_bytes_per_token":23040' in text
    assert '"load_ms":480' in text


def test_an_agent_killed_in_the_middle_of_an_eviction_goes_on_with_what_was_wanted(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 600)
    board.rig.ask(UnloadModel("a")).result(0)
    board.serve("b", 600)
    board.worker("b").stop = lambda grace_s=5.0: None  # type: ignore[method-assign]
    assert not board.rig.ask(LoadModel("a")).done()  # it waits until b is gone
    board.rig.restart()
    assert board.running == ["a"]
    assert board.rig.parts.deployments.slots["b"].phase is Phase.OFF
    board.rig.forward(60)
    assert board.load("b")["outcome"] == "loaded"


def test_a_model_whose_time_was_over_is_not_loaded_by_a_restart(folder: Path) -> None:
    board = Board(folder, keep_alive_s=60)
    board.serve("a", 400)
    board.worker("a").stop = lambda grace_s=5.0: None  # type: ignore[method-assign]
    board.rig.forward(60)
    assert board.reasons() == ["idle"]
    board.rig.restart()
    assert board.running == []
    assert board.load("a")["outcome"] == "loaded"


def test_a_model_given_up_is_tried_once_after_a_restart(folder: Path) -> None:
    board = Board(folder)
    board.serve("a", 400)

    def crash() -> None:
        worker = board.worker("a")
        worker.alive = False
        worker.say(Exited(-9, "worker.out_of_memory", "out of memory"))
        board.rig.settle()

    for _ in range(MAX_FAILURES):
        crash()
        board.rig.forward(20)
    board.rig.restart()
    assert board.running == ["a"]
    crash()
    slot = board.rig.parts.deployments.slots["a"]
    assert slot.phase is Phase.FAILED
    assert len(board.rig.headers("alarm.model_failed")) == 2
    board.rig.forward(20)
    assert board.running == []
    board.rig.forward(GIVEN_UP_S)
    assert board.running == ["a"]  # the retry's timer was set again as well
