"""Rollouts, audit and telemetry through the API and the commands, over real TLS with a real SQLite file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from garrison_controller.access import queries as access
from garrison_controller.access.tables import AdminEvent
from garrison_controller.bus.ingest import Ingest
from garrison_controller.cli.app import main
from garrison_controller.cli.client import ApiClient
from garrison_controller.devices.tables import Device
from garrison_controller.registry.tables import Package
from garrison_protocol import envelope, topics
from garrison_protocol.errors import ConflictError, DeniedError, InvalidError, NotFoundError
from garrison_protocol.states import Stream
from garrison_protocol.topics import Up
from tests.integration.controllers import Served, environment, served_controller
from tests.unit.rollouts.fleet import FakeBoard

pytestmark = pytest.mark.integration

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
Garrison = Callable[..., tuple[int, str, str]]


class Site:
    """A served controller with a package, boards, and people."""

    def __init__(self, served: Served) -> None:
        self.served, self.controller = served, served.controller
        self.boards = {name: FakeBoard(name) for name in ("edge-1", "edge-2", "plant-1")}
        self.people = {
            "rita": served.principal("rita", "release-manager"),
            "carl": served.principal("carl", "approver", "release-manager"),
            "pete": served.principal("pete", "model-publisher", "approver"),
            "anna": served.principal("anna", "auditor"),
            "vera": served.principal("vera", "viewer", "auditor", scope="/demo/"),
        }
        self.ingest = Ingest(
            self.controller.database,
            director=self.controller.keys.director,
            receipt_key=self.controller.keys.receipt,
            now=lambda: NOW,
        )
        with self.controller.database.session() as session:
            publisher = access.principal_by_name(session, "pete")
            assert publisher is not None
            session.add(
                Package(
                    name="smollm2",
                    version="1.0.0",
                    manifest_sha256="ab" * 32,
                    alias="smol",
                    manifest="{}",
                    size_bytes=1,
                    published_at=NOW,
                    published_by=publisher.id,
                    published_by_name="pete",
                    targets_version=1,
                )
            )
            for name, board in self.boards.items():
                session.add(
                    Device(
                        id=name,
                        name=name,
                        group="/demo/" if name.startswith("edge") else "/plant/",
                        labels={},
                        identity_public=board.key.public_hex,
                        state="enrolled",
                        enrolled_at=NOW,
                        cert_serial=name,
                        cert_not_after=NOW,
                    )
                )

    def client(self, name: str) -> ApiClient:
        return self.people[name]

    def send(self, device: str, kind: Up, document: dict[str, Any]) -> None:
        sealed = envelope.seal(kind.value, json.dumps(document).encode(), self.boards[device].key)
        self.ingest.handle(topics.up(device, kind), sealed)

    def activate(self, device: str, rollout: dict[str, Any], state: str = "ACTIVE") -> None:
        board = self.boards[device]
        board.revision += 1
        package = {
            "name": rollout["model"],
            "version": rollout["version"],
            "manifest_sha256": rollout["manifest_sha256"],
        }
        alias = {"alias": rollout["alias"], "package": package, "rollout": rollout["id"], "state": state, "step": 7}
        self.send(device, Up.REPORT, {"device": device, "revision": board.revision, "aliases": [alias]})


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with served_controller(tmp_path) as served:
        site = Site(served)
        yield site
        for client in site.people.values():
            client.close()


@pytest.fixture
def garrison(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Garrison:
    tokens = {
        name: site.served.admin.post("/api/v1/access/tokens", {"principal": name})["token"] for name in site.people
    }

    def run(who: str, *arguments: str) -> tuple[int, str, str]:
        for key, value in environment(site.served.url, tokens[who], site.served.ca, tmp_path).items():
            if key.startswith(("GARRISON_", "XDG_")):
                monkeypatch.setenv(key, value)
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        status = main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


CREATE = (
    "rollout",
    "create",
    "smol-1",
    "--model",
    "smollm2",
    "--version",
    "1.0.0",
    "--scope",
    "/demo/",
    "--group",
    "canary=name=edge-1",
    "--group",
    "rest=*",
    "--soak",
    "30s",
    "--max-ttft-ms",
    "500",
)


def test_a_rollout_from_creation_to_its_end(site: Site, garrison: Garrison) -> None:
    status, out, err = garrison("rita", *CREATE)
    assert status == 0, err
    assert "WAITING_FOR_APPROVAL" in out
    assert "edge-2" in out
    assert "garrison rollout approve smol-1" in err

    status, _, err = garrison("rita", "rollout", "approve", "smol-1")
    assert (status, "access.denied" in err) == (7, True)  # no approver at all
    status, _, err = garrison("pete", "rollout", "approve", "smol-1")
    assert (status, "access.four_eyes" in err) == (7, True)  # pete published the model
    status, out, err = garrison("carl", "rollout", "approve", "smol-1", "--comment", "good")
    assert (status, "RUNNING" in out) == (0, True), err

    status, out, _ = garrison("vera", "rollout", "show", "smol-1", "-o", "json")
    rollout = json.loads(out)
    assert rollout["approvals"][0]["principal"] == "carl"
    assert [board["state"] for group in rollout["groups"] for board in group["boards"]] == ["QUEUED", "SCHEDULED"]
    assert rollout["limits"] == {"max_ttft_ms": 500.0}

    site.activate("edge-1", rollout)
    status, out, _ = garrison("vera", "rollout", "show", "smol-1")
    assert "SUCCEEDED" in out
    site.activate("edge-2", rollout)
    status, out, _ = garrison("vera", "rollout", "watch", "smol-1", "--interval", "0.2")
    assert status == 0
    assert "FINISHED" in out
    assert out.count("SUCCEEDED") >= 2
    status, out, _ = garrison("vera", "rollout", "watch", "smol-1", "-o", "json")
    assert json.loads(out)["status"] == "FINISHED"
    status, out, _ = garrison("vera", "rollout", "list")
    assert "SUCCEEDED=2" in out


def test_a_creator_with_every_right_still_cannot_approve(site: Site, garrison: Garrison) -> None:
    assert garrison("carl", *CREATE)[0] == 0
    status, _, err = garrison("carl", "rollout", "approve", "smol-1")
    assert (status, "access.four_eyes" in err) == (7, True)
    with site.controller.database.reading() as session:
        denials = session.scalars(select(AdminEvent.principal).where(AdminEvent.outcome == "denied")).all()
    assert denials == ["carl"]


def test_a_failure_pauses_and_stop_ends(site: Site, garrison: Garrison) -> None:
    garrison("rita", *CREATE)
    garrison("carl", "rollout", "approve", "smol-1")
    rollout = site.client("rita").get("/api/v1/rollouts/smol-1")
    site.activate("edge-1", rollout, "ROLLED_BACK")
    status, out, _ = garrison("rita", "rollout", "watch", "smol-1")
    assert (status, "PAUSED" in out, "1 of 1 boards failed" in out) == (0, True, True)
    status, _, err = garrison("rita", "rollout", "resume", "smol-1")
    assert (status, "rollout.group_failed" in err) == (5, True)
    status, out, _ = garrison("rita", "rollout", "stop", "smol-1")
    assert (status, "STOPPED" in out) == (0, True)
    status, _, err = garrison("rita", "rollout", "pause", "smol-1")
    assert (status, "rollout.status" in err) == (5, True)


def test_verbs_that_wait_for_an_operator(site: Site, garrison: Garrison) -> None:
    garrison("rita", *CREATE, "--no-start-on-approval")
    assert "READY" in garrison("carl", "rollout", "approve", "smol-1")[1]
    assert "RUNNING" in garrison("rita", "rollout", "start", "smol-1")[1]
    assert "PAUSED" in garrison("rita", "rollout", "pause", "smol-1", "--reason", "shift change")[1]
    assert site.client("rita").get("/api/v1/rollouts/smol-1")["pause_reason"] == "shift change"
    assert "RUNNING" in garrison("rita", "rollout", "resume", "smol-1")[1]
    assert garrison("rita", "rollout", "trigger-next-group", "smol-1")[0] == 0
    groups = site.client("rita").get("/api/v1/rollouts/smol-1")["groups"]
    assert [group["status"] for group in groups] == ["RUNNING", "RUNNING"]
    status, _, err = garrison("rita", "rollout", "watch", "smol-1", "--interval", "0.2", "--timeout", "1s")
    assert (status, "rollout.watch_timeout" in err) == (8, True)
    garrison("rita", "rollout", "create", "two", "--model", "smollm2", "--version", "1.0.0")
    assert "APPROVAL_DENIED" in garrison("carl", "rollout", "deny", "two")[1]


def test_rights_are_bounded_by_scope(site: Site) -> None:
    spec = {"name": "all", "model": "smollm2", "version": "1.0.0"}
    with site.served.principal("local", "release-manager", scope="/demo/") as local:
        with pytest.raises(DeniedError):
            local.post("/api/v1/rollouts", spec)
        local.post("/api/v1/rollouts", spec | {"name": "here", "scope": "/demo/"})
    site.client("rita").post("/api/v1/rollouts", spec)
    assert [one["name"] for one in site.client("vera").get("/api/v1/rollouts")["rollouts"]] == ["here"]
    with pytest.raises(DeniedError):
        site.client("vera").get("/api/v1/rollouts/all")


def test_wrong_calls_are_answered_with_stable_codes(site: Site) -> None:
    rita, carl = site.client("rita"), site.client("carl")
    spec: dict[str, Any] = {"name": "one", "model": "smollm2", "version": "1.0.0"}
    with pytest.raises(InvalidError):
        rita.post("/api/v1/rollouts", spec | {"groups": [{"name": "a"}]})
    with pytest.raises(InvalidError):
        rita.post("/api/v1/rollouts", spec | {"success_threshold": 0})
    with pytest.raises(InvalidError):
        rita.post("/api/v1/rollouts", spec | {"surprise": True})
    with pytest.raises(NotFoundError):
        rita.post("/api/v1/rollouts", spec | {"model": "unknown"})
    with pytest.raises(NotFoundError):
        rita.get("/api/v1/rollouts/unknown")
    rita.post("/api/v1/rollouts", spec)
    with pytest.raises(ConflictError):
        rita.post("/api/v1/rollouts", spec)
    with pytest.raises(ConflictError):
        carl.post("/api/v1/rollouts/one/approve", {"digest": "0" * 64})
    with pytest.raises(InvalidError):
        carl.post("/api/v1/rollouts/one/approve", {})


@pytest.fixture
def recorded(site: Site) -> Site:
    for name, board in site.boards.items():
        for number in range(5):
            board.record("deployment.active", {"n": number}, alias="smol")
            board.measure(requests=number, online=number > 2)
        for stream, kind in ((Stream.AUDIT, Up.AUDIT), (Stream.TELEMETRY, Up.TELEMETRY)):
            site.ingest.handle(topics.up(name, kind), board.seal(kind.value, board.batch(stream=stream)))
    return site


def test_what_boards_sent_can_be_listed_verified_and_exported(
    recorded: Site, garrison: Garrison, tmp_path: Path
) -> None:
    status, out, _ = garrison("anna", "audit", "verify")
    assert (status, "6 chains, 30 rows, 0 bad" in out) == (0, True)
    status, out, _ = garrison("anna", "audit", "streams", "-o", "json")
    heads = {(one["device"], one["stream"]): (one["up_to"], one["hash"]) for one in json.loads(out)["streams"]}
    assert heads["edge-1", "audit"] == (5, recorded.boards["edge-1"].entries[-1].hash)
    status, out, _ = garrison("anna", "audit", "list", "--device", "edge-1", "--kind", "deployment.*", "-o", "json")
    entries = json.loads(out)["entries"]
    assert [entry["seq"] for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0]["facts"] == {"alias": "smol"}
    assert entries[0]["body"] == {"n": 0}
    assert "deployment.active" in garrison("anna", "audit", "list", "--limit", "3")[1]
    assert garrison("anna", "audit", "export", "--out", str(tmp_path / "x.jsonl"), "--device", "edge-1")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["hash"] for line in lines] == [entry.hash for entry in recorded.boards["edge-1"].entries]
    assert "No alarms" in garrison("anna", "audit", "alarms")[1]


def test_an_altered_row_gives_exit_status_6(recorded: Site, garrison: Garrison) -> None:
    with recorded.controller.database.session() as session:
        session.connection().exec_driver_sql(
            "UPDATE stream_row SET body = '{}' WHERE device_id = 'edge-2' AND stream = 'audit' AND seq = 4"
        )
    status, out, err = garrison("anna", "audit", "verify")
    assert status == 6
    assert "edge-2 audit epoch 00000000000000aa entry 4: the body was altered" in err
    assert "1 bad" in out


def test_auditors_see_only_their_groups(recorded: Site) -> None:
    vera = recorded.client("vera")
    assert {one["device"] for one in vera.get("/api/v1/audit/streams")["streams"]} == {"edge-1", "edge-2"}
    assert {one["device"] for one in vera.get("/api/v1/audit/entries")["entries"]} == {"edge-1", "edge-2"}
    assert {one["device"] for one in vera.get("/api/v1/audit/verify")["chains"]} == {"edge-1", "edge-2"}
    assert vera.get("/api/v1/audit/entries", {"device": "plant-1"})["entries"] == []
    assert b"plant-1" not in vera.fetch("/api/v1/audit/export")
    with pytest.raises(DeniedError):
        vera.get("/api/v1/audit/refusals")
    with pytest.raises(DeniedError):
        recorded.client("rita").get("/api/v1/audit/streams")
    with pytest.raises(DeniedError):
        vera.get("/api/v1/devices/plant-1/metrics")


def test_metrics_show_the_offline_hours(recorded: Site, garrison: Garrison) -> None:
    document = recorded.client("vera").get("/api/v1/devices/edge-1/metrics", {"limit": 4})
    assert [row["seq"] for row in document["rows"]] == [2, 3, 4, 5]
    assert document["summary"]["offline"] == 2
    status, out, err = garrison("vera", "device", "metrics", "edge-1")
    assert (status, "3 taken offline" in out) == (0, True), err


def test_refused_messages_are_counted_for_auditors(site: Site) -> None:
    site.ingest.handle(topics.up("edge-1", Up.STATUS), b"garbage")
    (refusal,) = site.client("anna").get("/api/v1/audit/refusals")["refusals"]
    assert (refusal["sender"], refusal["code"], refusal["count"]) == ("edge-1", "envelope.malformed", 1)
