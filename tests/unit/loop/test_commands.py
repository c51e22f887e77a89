"""The local API's commands, answered by the owner; telemetry and request records."""

from __future__ import annotations

from typing import Any

import pytest

from garrison_agent.api.commands import (
    AddApp,
    Doctor,
    GetStatus,
    GetVariants,
    ListCache,
    ListLoaded,
    ListModels,
    LoadModel,
    RecordRequest,
    RemoveFromCache,
    ShowApp,
    UnloadModel,
)
from garrison_agent.core.slot import Phase
from garrison_agent.events import Tick
from garrison_agent.owner.commands import MAX_WAITERS
from garrison_agent.owner.workers import DRAIN_S, STOP_GRACE_S
from garrison_agent.runtimes.status import RequestDone, RequestRecord
from garrison_protocol.errors import ConflictError, InsufficientError, NotFoundError, UnavailableError
from garrison_protocol.states import DeploymentState as State
from tests.fakes.packages import Package
from tests.unit.loop.rig import DEVICE, Rig, entry, package


def test_unload_and_load(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    assert rig.ask(UnloadModel("chat")).result(0) == {"id": "chat:1.0", "alias": "chat", "outcome": "unloaded"}
    assert rig.models.running == []
    assert rig.ask(UnloadModel("chat:1.0")).result(0) == {"id": "chat:1.0", "alias": "chat", "outcome": "not_loaded"}
    assert rig.ask(LoadModel("chat")).result(0) == {"id": "chat:1.0", "alias": "chat", "outcome": "loaded"}
    assert rig.ask(LoadModel("chat")).result(0) == {"id": "chat:1.0", "alias": "chat", "outcome": "already_loaded"}
    assert {"api.unload", "api.load"} <= set(rig.audit())


def test_an_unload_has_happened_also_where_the_next_request_loads_the_model_again(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    leaving = rig.models.worker("chat:1.0")
    leaving.lingers = True
    unload = rig.ask(UnloadModel("chat"))
    load = rig.ask(LoadModel("chat"))
    rig.settle()
    assert not unload.done()  # its process takes its time
    leaving.die(0)
    rig.settle()
    assert unload.result(0) == {"id": "chat:1.0", "alias": "chat", "outcome": "unloaded"}
    assert load.result(0)["outcome"] == "loaded"  # type: ignore[index]
    assert rig.models.running == ["chat:1.0"]


def test_an_unload_lets_answers_end_and_the_next_request_does_not_wait_for_them(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    old = rig.models.worker("chat:1.0")
    old.lingers = True
    assert rig.parts.traffic.enter(old.spec.socket)
    unload = rig.ask(UnloadModel("chat"))
    assert old.grace_s == DRAIN_S
    assert rig.ask(ListLoaded()).result(0) == []
    assert rig.ask(LoadModel("chat")).result(0)["outcome"] == "loaded"  # type: ignore[index]
    assert rig.models.running == ["chat:1.0", "chat:1.0"]
    assert not unload.done()
    assert rig.models.worker("chat:1.0") is not old
    rig.parts.traffic.leave(old.spec.socket)
    old.die(0)
    rig.settle()
    assert unload.result(0) == {"id": "chat:1.0", "alias": "chat", "outcome": "unloaded"}
    assert rig.models.running == ["chat:1.0"]


def test_who_unloads_what_is_ending_its_answers_waits_for_that_too(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    worker = rig.models.worker("chat:1.0")
    worker.lingers = True
    assert rig.parts.traffic.enter(worker.spec.socket)
    first, second = rig.ask(UnloadModel("chat")), rig.ask(UnloadModel("chat"))
    assert not second.done()
    worker.die(0)
    rig.settle()
    assert (first.result(0), second.result(0)) == ({"id": "chat:1.0", "alias": "chat", "outcome": "unloaded"},) * 2
    assert rig.audit().count("api.unload") == 1


def test_a_model_without_answers_has_no_time_to_end_them(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    worker = rig.models.worker("chat:1.0")
    assert rig.parts.traffic.enter(worker.spec.socket)
    rig.parts.traffic.leave(worker.spec.socket)
    rig.ask(UnloadModel("chat")).result(0)
    assert worker.grace_s == STOP_GRACE_S


def test_unloaded_stays_unloaded_over_a_restart(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.ask(UnloadModel("chat"))
    rig.restart()
    assert rig.models.running == []
    route = rig.parts.routes.table.find("chat")
    assert route is not None
    assert route.socket is None


def test_many_wait_for_one_load(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.ask(UnloadModel("chat"))
    rig.models.holding = True
    started = len(rig.models.started)
    answers = [rig.ask(LoadModel("chat")) for _ in range(3)]
    assert not any(answer.done() for answer in answers)
    rig.models.release()
    rig.settle()
    assert all(answer.done() for answer in answers)
    assert len(rig.models.started) == started + 1


def test_a_load_that_fails_says_so(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.ask(UnloadModel("chat"))
    rig.models.broken["chat:1.0"] = ("model.load_failed", "out of memory")
    with pytest.raises(UnavailableError, match=r"model\.load_failed"):
        rig.ask(LoadModel("chat")).result(0)
    rig.models.broken["chat:1.0"] = ("model.digest_mismatch", "flipped")
    rig.work.offline_now = True
    rig.forward(2)
    with pytest.raises(UnavailableError, match=r"model\.repairing"):
        rig.ask(LoadModel("chat")).result(0)


def test_what_cannot_be_loaded_now(rig: Rig) -> None:
    rig.connect()
    with pytest.raises(NotFoundError, match=r"model\.unknown"):
        rig.ask(LoadModel("chat")).result(0)
    rig.desire(entry(package("1.0").ref))
    rig.settle()
    with pytest.raises(ConflictError, match=r"model\.not_installed"):
        rig.ask(LoadModel("chat")).result(0)


def test_loading_never_exceeds_the_memory_budget(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0", memory_mb=600), "r1")
    rig.ask(UnloadModel("chat"))
    other = package("1.0", name="other", memory_mb=600)
    rig.work.publish(other)
    rig.desire(entry(package("1.0", memory_mb=600).ref, "r1"), entry(other.ref, "r2", alias="other"))
    rig.forward(1)
    with pytest.raises(InsufficientError, match=r"memory\.busy"):
        rig.ask(LoadModel("chat")).result(0)


def test_those_who_wait_are_bounded(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package(), "r1")
    rig.ask(UnloadModel("chat")).result(0)
    rig.models.holding = True
    waiting = [rig.ask(LoadModel("chat")) for _ in range(MAX_WAITERS)]
    with pytest.raises(UnavailableError, match=r"agent\.busy"):
        rig.ask(LoadModel("chat")).result(0)
    rig.models.release()
    rig.settle()
    assert all(one.result(0) for one in waiting)


def test_a_switch_is_not_disturbed(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.models.holding = True
    two = package("2.0")
    rig.work.publish(two)
    rig.desire(entry(two.ref, "r2"))
    rig.settle()
    assert rig.slot.state is State.LOADING
    with pytest.raises(ConflictError, match=r"model\.busy"):
        rig.ask(UnloadModel("chat")).result(0)


def test_the_cache(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.deploy(package("2.0"), "r2")
    cache: Any = rig.ask(ListCache()).result(0)
    assert [(one["id"], one["state"], one["in_use"]) for one in cache["entries"]] == [
        ("chat:1.0", "unused", False),
        ("chat:2.0", "loaded", True),
    ]
    with pytest.raises(ConflictError, match=r"cache\.in_use"):
        rig.ask(RemoveFromCache("chat:2.0")).result(0)
    removed: Any = rig.ask(RemoveFromCache("chat:1.0")).result(0)
    assert removed == {"id": "chat:1.0", "freed_bytes": package("1.0").variant.size_bytes}
    assert [one.ref.id for one in rig.shelf.packages()] == ["chat:2.0"]
    with pytest.raises(NotFoundError):
        rig.ask(RemoveFromCache("chat:1.0")).result(0)


def test_status_models_and_doctor(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    status: Any = rig.ask(GetStatus()).result(0)
    assert (status["device"], status["connected"]) == (DEVICE, True)
    alias = status["aliases"][0]
    assert (alias["state"], alias["serving"], alias["loaded"], alias["endpoint"]) == ("ACTIVE", "chat:1.0", True, "/v1")
    assert status["outbox"]["audit"]["pending"] > 0
    models: Any = rig.ask(ListModels()).result(0)
    assert [(one["id"], one["serving"], one["loaded"]) for one in models] == [("chat:1.0", True, True)]
    checks: Any = rig.ask(Doctor()).result(0)
    assert {check["outcome"] for check in checks} == {"ok"}
    rig.disconnect()
    rig.models.worker("chat:1.0").die()
    rig.settle()
    outcomes: Any = rig.ask(Doctor()).result(0)
    assert {check["name"]: check["outcome"] for check in outcomes}["broker"] == "warn"
    assert {check["name"]: check["outcome"] for check in outcomes}["model chat"] == "fail"


def test_requests_of_a_second_are_one_audit_entry(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    worker = rig.models.worker("chat:1.0")
    for index in range(5):
        record = RequestRecord("chat", index > 0, None if index else "inference.failed", 10, 20, 12.5, 500.25, 40.125)
        worker.say(RequestDone(record))
    rig.forward(2)
    segments = rig.headers("inference.segment")
    assert [(one["count"], one["errors"]) for one in segments] == [(5, 1)]
    rig.owner.handle(Tick.SAMPLE)
    sample = rig.headers("sample")[0]
    assert (sample["requests"], sample["errors"], sample["completion_tokens"]) == (5, 1, 100)
    assert (sample["ttft_ms_p50"], sample["tps_milli"], sample["loaded"]) == (12, 40125, "chat")
    rig.owner.handle(Tick.SAMPLE)
    assert rig.headers("sample")[1]["requests"] == 0


def test_requests_to_upstreams_are_recorded_and_charged_like_any_other(rig: Rig) -> None:
    rig.ask(AddApp(name="camera", tokens_per_min=50)).result(0)
    record = RequestRecord("chat", ok=True, prompt_tokens=40, completion_tokens=20, app="camera")
    assert rig.ask(RecordRequest("big", "big:upstream", record)).result(0) is None
    rig.forward(2)
    (segment,) = rig.headers("inference.segment")
    assert segment["count"] == 1
    assert rig.ask(ShowApp("camera")).result(0)["tokens"] == 60  # type: ignore[index]
    assert set(rig.parts.applications.table.tokens) == {"camera"}


def test_requests_are_recorded_even_when_the_agent_stops_within_the_second(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.models.worker("chat:1.0").say(RequestDone(RequestRecord("chat", True)))
    rig.settle()
    rig.owner.stop("SIGTERM")
    assert rig.audit()[-2:] == ["inference.segment", "agent.stopped"]


def test_loading_in_vain_is_given_up_after_its_time(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.ask(UnloadModel("chat"))
    rig.models.holding = True
    answer = rig.ask(LoadModel("chat"))
    rig.forward(1801)
    assert answer.done()
    assert rig.slot.phase in (Phase.BACKOFF, Phase.STARTING)


def test_models_in_memory_are_listed_with_their_speed_lately(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")

    def speed() -> object:
        views: Any = rig.ask(ListLoaded()).result(0)
        return [(one["alias"], one["tokens_per_s"]) for one in views]

    assert speed() == [("chat", None)]
    worker = rig.models.worker("chat:1.0")
    worker.say(RequestDone(RequestRecord("chat", True, None, 10, 20, 12.5, 500.0, 40.0)))
    worker.say(RequestDone(RequestRecord("chat", True, None, 10, 2, 12.5, 500.0, 900.0)))  # too short to count
    rig.settle()
    assert speed() == [("chat", 40.0)]
    worker.say(RequestDone(RequestRecord("chat", True, None, 10, 20, 12.5, 500.0, 20.0)))
    rig.settle()
    assert speed() == [("chat", 30.0)]
    rig.ask(UnloadModel("chat"))
    assert speed() == []


def test_every_build_of_a_package_is_judged_for_this_board(rig: Rig) -> None:
    rig.connect()
    fits = package("1.0")
    large = fits.variant.model_copy(update={"name": "large", "memory_mb": 9000})
    made = Package(fits.manifest.model_copy(update={"variants": (large, fits.variant)}), fits.blobs)
    rig.deploy(made, "r1")
    for name in ("chat", "chat:1.0"):
        view: Any = rig.ask(GetVariants(name)).result(0)
        found = {one["name"]: (one["fits"], one["chosen"], one["missing_bytes"]) for one in view["variants"]}
        assert found == {fits.variant.name: (True, True, 0), "large": (False, False, 0)}
        (reason,) = next(one["reasons"] for one in view["variants"] if one["name"] == "large")
        assert "9000 MiB" in reason
        assert "1000" in reason  # the budget
    with pytest.raises(NotFoundError, match=r"model\.unknown"):
        rig.ask(GetVariants("nobody")).result(0)


def test_a_package_that_was_rejected_here_says_why(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0", memory_mb=5000), "r1")
    assert rig.state == "REJECTED"
    view: Any = rig.ask(GetVariants("chat")).result(0)
    (one,) = view["variants"]
    assert (one["fits"], one["chosen"]) == (False, False)
    assert one["missing_bytes"] == one["size_bytes"]
    assert one["reasons"]
