"""Applications, as the owner keeps them; what requests cost; what is measured for Prometheus and the controller."""

from __future__ import annotations

from typing import Any

import pytest

from garrison_agent.adapters.database import MIGRATIONS, Database
from garrison_agent.api.commands import AddApp, GetMetrics, ListApps, RemoveApp, ShowApp
from garrison_agent.core.applications import MAX_APPLICATIONS
from garrison_agent.core.exposition import render
from garrison_agent.events import Tick
from garrison_agent.runtimes.status import RequestDone, RequestRecord
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError
from tests.unit.loop.rig import Rig, package


def add(rig: Rig, name: str = "camera", **limits: Any) -> dict[str, Any]:
    added: Any = rig.ask(AddApp(name, **limits)).result(0)
    return dict(added)


def chat(app: str, tokens: int = 20) -> RequestDone:
    return RequestDone(RequestRecord("chat", True, None, 10, tokens, 12.5, 500.25, 40.0, app=app))


def test_an_application_survives_a_restart_and_its_key_is_stored_nowhere(rig: Rig) -> None:
    added = add(rig, models=("smol", "chat"), requests_per_min=60, tokens_per_min=500, concurrent=2, admin=True)
    key = added.pop("key")
    assert len(key) == 4 + 64
    found = rig.parts.applications.table.of_key(key)
    assert found is not None
    rig.restart()
    assert rig.parts.applications.table.of_key(key) == found
    assert rig.ask(ShowApp("camera")).result(0) == added
    dump = "\n".join(rig.database.connection.iterdump())
    assert key not in dump
    assert key[4:] not in dump
    assert found.key_sha256 in dump


def test_the_record_says_who_came_and_went(rig: Rig) -> None:
    add(rig, models=("chat",), requests_per_min=60)
    removed: Any = rig.ask(RemoveApp("camera")).result(0)
    assert removed["models"] == ["chat"]
    (added,), (gone,) = rig.headers("app.added"), rig.headers("app.removed")
    assert (added["name"], added["models"], added["requests_per_min"], added["admin"]) == ("camera", "chat", 60, False)
    assert gone["name"] == "camera"


def test_a_removed_applications_key_opens_nothing(rig: Rig) -> None:
    first = add(rig)["key"]
    rig.ask(RemoveApp("camera")).result(0)
    second = add(rig)["key"]
    table = rig.parts.applications.table
    assert table.of_key(first) is None
    assert table.of_key(second) is not None
    assert first != second


def test_what_is_refused_changes_nothing(rig: Rig) -> None:
    add(rig)
    before = rig.parts.applications.table
    with pytest.raises(ConflictError, match=r"app\.exists"):
        add(rig)
    with pytest.raises(InvalidError, match=r"app\.name_malformed"):
        add(rig, "uid:0")
    with pytest.raises(InvalidError, match=r"app\.limit_out_of_range"):
        add(rig, "other", concurrent=-1)
    for command in (RemoveApp("other"), ShowApp("other")):
        with pytest.raises(NotFoundError) as unknown:
            rig.ask(command).result(0)
        assert unknown.value.hint == "known here: camera"
    assert rig.parts.applications.table is before
    assert rig.audit().count("app.added") == 1


def test_there_is_an_end_to_applications(rig: Rig) -> None:
    for number in range(MAX_APPLICATIONS):
        add(rig, f"app{number}")
    with pytest.raises(ConflictError, match=r"app\.too_many"):
        add(rig, "one-more")


def test_requests_are_charged_to_whom_they_belong(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    add(rig, tokens_per_min=100)
    worker = rig.models.worker("chat:1.0")
    for app in ("camera", "camera", "uid:0", "local", "nobody"):
        worker.say(chat(app))
    rig.settle()
    listed: Any = rig.ask(ListApps()).result(0)
    assert [(one["name"], one["requests"], one["tokens"]) for one in listed] == [("camera", 2, 60)]
    now_s = rig.clock.monotonic_s
    assert rig.parts.applications.table.tokens["camera"].left(now_s) == 40
    rig.forward(2)
    (row,) = rig.database.connection.execute("SELECT body FROM entry WHERE kind = 'inference.segment'").fetchone()
    assert row.count('"app":"camera"') == 2


def test_a_store_of_before_there_were_applications(rig: Rig) -> None:
    rig.stop()
    path = rig.config.database_path.with_name("old.db")
    old = Database(path)
    old.connection.executescript(f"DROP TABLE app; PRAGMA user_version = {len(MIGRATIONS) - 1}")
    old.put("kept", "1")
    old.close()
    new = Database(path)
    assert new.connection.execute("SELECT count(*) FROM app").fetchone() == (0,)
    assert new.get("kept") == "1"
    new.close()


def test_histograms_go_to_the_controller_once_for_each_window(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    worker = rig.models.worker("chat:1.0")
    for _ in range(3):
        worker.say(chat("camera"))
    rig.settle()
    rig.owner.handle(Tick.SAMPLE)
    rig.owner.handle(Tick.SAMPLE)
    (row,) = rig.headers("gen_ai")
    assert (row["model"], row["operation"], row["not_answered"]) == ("chat", "chat", 0)
    assert row["gen_ai.server.time_to_first_token"] == "0 0 0 3"
    assert row["gen_ai.client.token.usage.output.sum"] == 60


def test_what_prometheus_hears(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    worker = rig.models.worker("chat:1.0")
    worker.say(chat("camera"))
    rig.settle()
    rig.owner.handle(Tick.SAMPLE)
    worker.say(chat("camera"))
    families: Any = rig.ask(GetMetrics()).result(0)
    page = render(families)
    labels = 'gen_ai_request_model="chat",gen_ai_operation_name="chat"'
    assert f"gen_ai_server_request_duration_seconds_count{{{labels}}} 2\n" in page  # of both windows
    assert 'garrison_model_loaded{gen_ai_request_model="chat",model_id="chat:1.0"} 1\n' in page
    assert 'garrison_outbox_pending_rows{stream="audit"} ' in page
    assert "garrison_board_memory_bytes{} " in page
    assert "camera" not in page
