"""The controller's API for boards and operators, over real TLS with a real SQLite file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from garrison_controller.access import queries
from garrison_controller.cli.app import main
from garrison_controller.cli.client import ApiClient
from garrison_controller.devices.tables import Device
from garrison_protocol import topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.chain import commitment
from garrison_protocol.errors import (
    ConflictError,
    DeniedError,
    GarrisonError,
    InvalidError,
    NotFoundError,
    UnauthenticatedError,
)
from garrison_protocol.messages.enrolment import EnrolResponse, NonceResponse, SessionResponse, parse_enrolment
from garrison_protocol.messages.streams import Batch, Row
from garrison_protocol.states import Stream
from garrison_protocol.topics import Up
from tests.integration.controllers import Served, served_controller
from tests.unit.devices.boards import Board
from tests.unit.rollouts.fleet import FakeBoard

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_controller(tmp_path_factory.mktemp("controller")) as served:
        yield served


@pytest.fixture(scope="module")
def dora(served: Served) -> Iterator[ApiClient]:
    with served.principal("dora", "device-admin") as client:
        yield client


def admit(served: Served, dora: ApiClient, name: str, group: str = "/demo/") -> Board:
    enrolment = parse_enrolment(dora.post("/api/v1/enrolment/tokens", {"name": name, "group": group})["enrolment"])
    board = Board()
    with served.board_http() as http:
        answer = http.post("/device/v1/enroll", json=board.enrol_request(enrolment.token).model_dump())
        assert answer.status_code == 200, answer.text
    return board


def open_session(served: Served, board: Board, name: str) -> str:
    with served.board_http() as http:
        nonce = NonceResponse.model_validate_json(http.get("/device/v1/nonce").content)
        request = board.session_request(name, nonce.nonce)
        answer = http.post("/device/v1/session", json=request.model_dump())
        assert answer.status_code == 200, answer.text
        return SessionResponse.model_validate_json(answer.content).token


def events(served: Served) -> list[dict[str, Any]]:
    with served.controller.database.reading() as session:
        return [
            {"principal": one.principal, "action": one.action, "subject": one.subject, "outcome": one.outcome}
            for one in queries.events(session, limit=1000)
        ]


def test_a_board_trusts_only_what_its_enrolment_string_names(served: Served, dora: ApiClient) -> None:
    answer = dora.post("/api/v1/enrolment/tokens", {"name": "first", "group": "/demo/", "labels": {"site": "x"}})
    enrolment = parse_enrolment(answer["enrolment"])
    board = Board()
    with served.board_http() as http:
        assert sha256_hex(http.get("/device/v1/server-ca.pem").content) == enrolment.server_ca_sha256
        assert sha256_hex(http.get("/device/v1/metadata/1.root.json").content) == enrolment.root_sha256
        admitted = EnrolResponse.model_validate_json(
            http.post("/device/v1/enroll", json=board.enrol_request(enrolment.token).model_dump()).content
        )
        again = http.post("/device/v1/enroll", json=Board().enrol_request(enrolment.token).model_dump())
    assert (admitted.device, admitted.mqtt_host, admitted.mqtt_port) == ("first", "broker.example", 8883)
    certificate = x509.load_pem_x509_certificate(admitted.certificate_pem.encode())
    certificate.verify_directly_issued_by(served.controller.device_ca.certificate)
    assert (again.status_code, again.json()["code"]) == (403, "enrolment.token_used")
    refused = {"principal": "device:first", "action": "device.enrol", "subject": "first", "outcome": "refused"}
    assert refused in events(served)


def test_blobs_need_a_session_of_a_board_that_is_not_revoked(served: Served, dora: ApiClient) -> None:
    board = admit(served, dora, "blobby")
    data = b"model bytes" * 1000
    digest = sha256_hex(data)
    path = served.controller.registry.blobs.path(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    bearer = open_session(served, board, "blobby")
    with served.board_http(bearer) as http, served.board_http() as stranger, served.board_http("x.1.y.z") as liar:
        whole = http.get(f"/device/v1/blobs/{digest}")
        part = http.get(f"/device/v1/blobs/{digest}", headers={"Range": "bytes=5-9"})
        assert (whole.status_code, whole.content) == (200, data)
        assert (part.status_code, part.content) == (206, data[5:10])
        assert stranger.get(f"/device/v1/blobs/{digest}").json()["code"] == "session.missing"
        assert liar.get(f"/device/v1/blobs/{digest}").json()["code"] == "session.expired"
        assert dora.post("/api/v1/devices/blobby/revoke", {"reason": "stolen"})["state"] == "revoked"
        refused = http.get(f"/device/v1/blobs/{digest}")
        assert (refused.status_code, refused.json()["code"]) == (403, "device.revoked")
    with served.controller.database.reading() as session:
        serial = session.get_one(Device, "blobby").cert_serial
    revoked = x509.load_pem_x509_crl((served.controller.config.pki_dir / "device-ca.crl").read_bytes())
    assert revoked.get_revoked_certificate_by_serial_number(int(serial, 16)) is not None


def test_a_session_belongs_to_the_identity_key_and_its_nonce_to_one_answer(served: Served, dora: ApiClient) -> None:
    board = admit(served, dora, "sess")
    with served.board_http() as http:
        nonce = http.get("/device/v1/nonce").json()["nonce"]
        stolen = http.post("/device/v1/session", json=Board().session_request("sess", nonce).model_dump())
        assert (stolen.status_code, stolen.json()["code"]) == (403, "session.bad_proof")
        request = board.session_request("sess", nonce).model_dump()
        assert http.post("/device/v1/session", json=request).status_code == 200
        replayed = http.post("/device/v1/session", json=request)
        assert (replayed.status_code, replayed.json()["code"]) == (401, "session.nonce_invalid")


def test_an_operators_token_opens_no_boards_endpoint_and_the_other_way_round(served: Served, dora: ApiClient) -> None:
    bearer = open_session(served, admit(served, dora, "mixed"), "mixed")
    with pytest.raises(UnauthenticatedError, match=r"session\.expired"):
        served.admin.fetch("/device/v1/blobs/" + "0" * 64)
    with served.client(bearer) as client, pytest.raises(UnauthenticatedError, match=r"access\.token_unknown"):
        client.get("/api/v1/whoami")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/whoami"),
        ("GET", "/api/v1/devices"),
        ("GET", "/api/v1/devices/x"),
        ("POST", "/api/v1/enrolment/tokens"),
        ("POST", "/api/v1/devices/x/revoke"),
        ("GET", "/api/v1/access/principals"),
        ("POST", "/api/v1/access/principals"),
        ("POST", "/api/v1/access/tokens"),
        ("POST", "/api/v1/access/grants"),
        ("DELETE", "/api/v1/access/grants/x"),
        ("DELETE", "/api/v1/access/tokens/x"),
        ("GET", "/api/v1/access/events"),
    ],
)
def test_no_operators_endpoint_answers_a_stranger(served: Served, method: str, path: str) -> None:
    with served.board_http() as http:
        answer = http.request(method, path, json={"name": "x", "principal": "alice", "role": "viewer"})
    assert (answer.status_code, answer.json()["code"]) == (401, "access.token_missing")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_every_operators_endpoint_is_guarded(served: Served) -> None:
    with served.board_http() as http:
        paths = http.get("/api/openapi.json").json()["paths"]
    unguarded = [
        f"{method} {path}"
        for path, operations in paths.items()
        for method, operation in operations.items()
        if path.startswith("/api/v1/") and not operation.get("security")
    ]
    assert unguarded == []


def test_a_denial_is_answered_and_recorded(served: Served) -> None:
    with served.principal("vic", "viewer") as vic:
        with pytest.raises(DeniedError, match=r"access\.denied: vic has no device\.enrol"):
            vic.post("/api/v1/enrolment/tokens", {"name": "evil"})
        with pytest.raises(DeniedError):
            vic.post("/api/v1/access/grants", {"principal": "vic", "role": "approver"})
    denied = [one for one in events(served) if one["principal"] == "vic"]
    assert denied == [
        {"principal": "vic", "action": "device.enrol", "subject": "/api/v1/enrolment/tokens", "outcome": "denied"},
        {"principal": "vic", "action": "access.grant", "subject": "/api/v1/access/grants", "outcome": "denied"},
    ]


def test_a_principal_sees_and_changes_boards_of_its_group_only(served: Served, dora: ApiClient) -> None:
    admit(served, dora, "north-1", "/north/a/")
    admit(served, dora, "north-2", "/north/b/")
    admit(served, dora, "south-1", "/south/")
    with served.principal("nora", "device-admin", scope="/north/") as nora:
        assert [one["id"] for one in nora.get("/api/v1/devices")["devices"]] == ["north-1", "north-2"]
        page = nora.get("/api/v1/devices", {"limit": 1})
        assert ([one["id"] for one in page["devices"]], page["next"]) == (["north-1"], "north-1")
        found = nora.get("/api/v1/devices", {"filter": "group=/north/b/"})["devices"]
        assert [one["id"] for one in found] == ["north-2"]
        assert nora.get("/api/v1/devices/north-1")["group"] == "/north/a/"
        with pytest.raises(DeniedError):
            nora.get("/api/v1/devices/south-1")
        with pytest.raises(DeniedError):
            nora.post("/api/v1/devices/south-1/revoke", {})
        with pytest.raises(DeniedError):
            nora.post("/api/v1/enrolment/tokens", {"name": "south-2", "group": "/south/"})
        assert nora.post("/api/v1/enrolment/tokens", {"name": "north-3", "group": "/north/c/"})["name"] == "north-3"


def test_access_through_the_api(served: Served) -> None:
    admin = served.admin
    with served.principal("otto", "operator", scope="/demo/") as otto:
        who = otto.get("/api/v1/whoami")
        assert who["permissions"]["rollout.operate"] == ["/demo/"]
        listed = {one["name"]: one for one in admin.get("/api/v1/access/principals")["principals"]}
        assert listed["otto"]["grants"][0]["role"] == "operator"
        assert "token_sha256" not in json.dumps(listed)
        own = otto.post("/api/v1/access/tokens", {"principal": "otto", "days": 1})
        with pytest.raises(DeniedError):
            otto.post("/api/v1/access/tokens", {"principal": "alice"})
        assert otto.delete(f"/api/v1/access/tokens/{own['id']}") is None
        with served.client(own["token"]) as ended, pytest.raises(UnauthenticatedError, match=r"access\.token_expired"):
            ended.get("/api/v1/whoami")
        admin.delete(f"/api/v1/access/grants/{listed['otto']['grants'][0]['id']}")
        with pytest.raises(DeniedError):
            otto.get("/api/v1/devices")
    with pytest.raises(DeniedError, match=r"access\.grant_to_self"):
        admin.post("/api/v1/access/grants", {"principal": "alice", "role": "approver"})
    with pytest.raises(NotFoundError, match=r"access\.principal_not_found"):
        admin.post("/api/v1/access/grants", {"principal": "nobody", "role": "viewer"})
    page = admin.get("/api/v1/access/events", {"limit": 2})
    assert [one["action"] for one in page["events"]] == ["access.principal.create", "access.grant"]
    assert (
        admin.get("/api/v1/access/events", {"after": page["next"], "limit": 1})["events"][0]["id"] == page["next"] + 1
    )


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/api/v1/enrolment/tokens", {"name": "controller-9"}, "device.name_malformed"),
        ("/api/v1/enrolment/tokens", {"name": "a", "group": "nowhere"}, "access.scope_malformed"),
        ("/api/v1/enrolment/tokens", {"name": "a", "hours": 0}, "request.malformed"),
        ("/api/v1/enrolment/tokens", {}, "request.malformed"),
        ("/api/v1/devices/none/revoke", {}, "device.not_found"),
        ("/api/v1/nothing", {}, "http.404"),
    ],
)
def test_bad_calls_are_answered_with_a_code_and_a_hint(
    dora: ApiClient, path: str, body: dict[str, object], code: str
) -> None:
    with pytest.raises(GarrisonError) as caught:
        dora.post(path, body)
    assert caught.value.code == code
    assert caught.value.hint


def test_garbage_and_floods_do_no_harm(served: Served, dora: ApiClient) -> None:
    with served.board_http() as http:
        assert http.post("/device/v1/enroll", content=b"\xff\x00{").status_code == 422
        assert http.post("/device/v1/enroll", json={"token": "x"}).json()["code"] == "request.malformed"
        flood = http.post("/device/v1/enroll", content=b"x" * 200_000)
        assert (flood.status_code, flood.json()["code"]) == (413, "request.too_large")
        assert http.get("/device/v1/metadata/..%2f..%2fkeys%2fdirector.key").status_code == 404
        assert http.get("/healthz").json()["status"] == "ok"
    with pytest.raises(InvalidError, match=r"filter\.malformed"):
        dora.get("/api/v1/devices", {"filter": "bogus"})


def test_without_a_signed_root_there_are_no_tokens(served: Served, dora: ApiClient) -> None:
    root = served.controller.config.metadata_dir / "1.root.json"
    data = root.read_bytes()
    root.unlink()
    try:
        with pytest.raises(ConflictError, match=r"registry\.not_signed"):
            dora.post("/api/v1/enrolment/tokens", {"name": "early"})
    finally:
        root.write_bytes(data)


class TestCommands:
    """The commands, against the same controller."""

    @pytest.fixture(autouse=True)
    def _as_dora(self, served: Served, dora: ApiClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("GARRISON_URL", served.url)
        monkeypatch.setenv("GARRISON_CA", str(served.ca))
        token = served.admin.post("/api/v1/access/tokens", {"principal": "dora", "days": 1})["token"]
        monkeypatch.setenv("GARRISON_TOKEN", token)

    def test_admit_list_show_revoke(self, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["device", "token", "create", "cli-1", "--group", "/cli/", "--label", "site=x"]) == 0
        captured = capsys.readouterr()
        enrolment = parse_enrolment(captured.out)
        assert "works once" in captured.err
        with served.board_http() as http:
            http.post("/device/v1/enroll", json=Board().enrol_request(enrolment.token).model_dump()).raise_for_status()
        assert main(["device", "list", "--filter", "label.site=x,group=/cli/*"]) == 0
        table = capsys.readouterr().out
        assert "cli-1" in table
        assert "1 board, 0 online" in table
        assert main(["device", "list", "--filter", "name=cli-1", "-o", "json"]) == 0
        assert [one["id"] for one in json.loads(capsys.readouterr().out)] == ["cli-1"]
        assert main(["device", "show", "cli-1", "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["labels"] == {"site": "x"}
        assert main(["device", "revoke", "cli-1", "--reason", "test"]) == 0
        assert "cli-1 is revoked" in capsys.readouterr().out
        assert main(["device", "show", "cli-1"]) == 0
        assert "revoked" in capsys.readouterr().out

    def test_errors_of_the_server_reach_the_shell(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["device", "show", "nobody"]) == 4
        assert "no board nobody (device.not_found)\nhint: see `garrison device list`" in capsys.readouterr().err
        assert main(["device", "token", "create", "Bad_Name"]) == 2
        assert main(["access", "list"]) == 7
        assert "dora has no access.read" in capsys.readouterr().err

    def test_login_is_stored_for_oneself_only(
        self, served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["access", "login", "--url", served.url, "--ca", str(served.ca)]) == 0
        stored = tmp_path / "garrison" / "config.toml"
        assert stored.stat().st_mode & 0o777 == 0o600
        for name in ("GARRISON_URL", "GARRISON_TOKEN", "GARRISON_CA"):
            monkeypatch.delenv(name)
        capsys.readouterr()
        assert main(["access", "whoami", "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == "dora"
        monkeypatch.setenv("GARRISON_TOKEN", "garrison_wrong")
        assert main(["access", "login", "--url", served.url, "--ca", str(served.ca)]) == 7

    def test_access_commands(
        self, served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("GARRISON_TOKEN", served.admin_token)
        assert main(["access", "principal", "create", "carl"]) == 0
        assert main(["access", "grant", "carl", "operator", "--scope", "/cli/", "--for", "30d"]) == 0
        assert "carl is operator of /cli/" in capsys.readouterr().out
        assert main(["access", "token", "create", "carl", "--days", "1"]) == 0
        token = capsys.readouterr().out.strip()
        assert token.startswith("garrison_")
        assert main(["access", "list", "-o", "json"]) == 0
        carl = next(one for one in json.loads(capsys.readouterr().out)["principals"] if one["name"] == "carl")
        assert main(["access", "list"]) == 0
        assert "operator of /cli/" in capsys.readouterr().out
        assert main(["access", "withdraw", carl["grants"][0]["id"]]) == 0
        assert main(["access", "token", "revoke", carl["tokens"][0]["id"]]) == 0
        assert main(["access", "grant", "alice", "approver"]) == 7
        assert "another security-admin must grant it" in capsys.readouterr().err
        assert main(["access", "events", "-o", "json"]) == 0


def test_a_name_that_waits_for_its_board_is_not_taken_by_another_group(served: Served) -> None:
    with (
        served.principal("here", "device-admin", scope="/eu/here/") as here,
        served.principal("there", "device-admin", scope="/eu/there/") as there,
    ):
        here.post("/api/v1/enrolment/tokens", {"name": "edge-1", "group": "/eu/here/"})
        with pytest.raises(DeniedError):
            there.post("/api/v1/enrolment/tokens", {"name": "edge-1", "group": "/eu/there/"})
        here.post("/api/v1/enrolment/tokens", {"name": "edge-1", "group": "/eu/here/"})


def test_what_was_approved_into_a_group_is_seen_and_changed_there_only(served: Served) -> None:
    board, other = Board(), Board()
    with (
        served.principal("eva", "device-admin", scope="/eu/") as eva,
        served.principal("uma", "device-admin", scope="/us/") as uma,
        served.board_http() as http,
    ):
        for one, name in ((board, "asked-1"), (other, "asked-2")):
            answer = http.post("/device/v1/enroll", json=one.enrol_request(name=name).model_dump())
            assert answer.status_code == 202
        asked = {one["asked_name"] for one in uma.get("/api/v1/enrolment/requests")["requests"]}
        assert {"asked-1", "asked-2"} <= asked
        eva.post(f"/api/v1/enrolment/requests/{board.fingerprint}/approve", {"group": "/eu/"})
        asked = {one["asked_name"] for one in uma.get("/api/v1/enrolment/requests")["requests"]}
        assert "asked-1" not in asked
        assert "asked-2" in asked
        carried = board.offline_request("asked-1").model_dump()
        for path, body in (
            (f"requests/{board.fingerprint}/approve", {"group": "/us/"}),
            (f"requests/{board.fingerprint}/deny", {}),
            ("offline", {"group": "/us/", "request": carried}),
        ):
            with pytest.raises(DeniedError):
                uma.post(f"/api/v1/enrolment/{path}", body)
        (mine,) = [one for one in eva.get("/api/v1/enrolment/requests")["requests"] if one["name"] == "asked-1"]
        assert (mine["state"], mine["group"]) == ("approved", "/eu/")


def test_revocation_lists_are_written_one_after_another(served: Served) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(served.controller.write_revocation_list) for _ in range(60)]:
            done.result()


@pytest.mark.parametrize("path", ["%00", "a" * 300, "%2e%2e/%2e%2e/keys/director.key"])
def test_odd_target_paths_are_not_found(served: Served, path: str) -> None:
    with served.board_http() as http:
        assert http.get(f"/device/v1/targets/{'0' * 64}/{path}").status_code == 404


@pytest.mark.parametrize(
    ("fact", "body"), [("", "no json"), (',"xx":NaN', None), (',"xx":1e999', None), (',"xx":"\\ud800"', None)]
)
def test_an_entry_that_no_answer_can_hold_hides_no_others(
    served: Served, dora: ApiClient, fact: str, body: str | None
) -> None:
    name = f"odd-{sha256_hex(fact.encode())[:8]}"
    board = FakeBoard(name, admit(served, dora, name).identity)
    header = json.loads(board.record().header)
    salt = "00" * 16 if body else None
    if body and salt:
        header["c"] = commitment(salt, body)
    row = Row(header=json.dumps(header)[:-1] + fact + "}", body=body, salt=salt)
    batch = Batch(device=name, stream=Stream.AUDIT, epoch=board.epoch, first=1, rows=(row,))
    served.controller.bus._ingest.handle(topics.up(name, Up.AUDIT), board.seal("audit", batch))
    with served.principal(f"auditor-{name}", "auditor") as auditor:
        entries = auditor.get("/api/v1/audit/entries", {"device": name})["entries"]
        assert [(entry["device"], entry["seq"]) for entry in entries] == [(name, 1)]
        assert auditor.get("/api/v1/audit/verify", {"device": name})["ok"]
