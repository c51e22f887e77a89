"""``garrison device``: every way to admit boards, as an operator types it, against a controller behind TLS."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from garrison_controller.cli.app import main
from garrison_protocol import envelope
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.messages.anchor import Anchor
from garrison_protocol.messages.base import parse_message
from garrison_protocol.messages.enrolment import OfflineResponse, parse_enrolment
from tests.integration.controllers import Served, served_controller
from tests.unit.devices.boards import Board

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_controller(tmp_path_factory.mktemp("controller")) as served:
        yield served


Garrison = Callable[..., tuple[int, str, str]]


@pytest.fixture
def garrison(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Garrison:
    """Run a command as a device-admin; return its exit status and what it printed."""
    operator = served.admin
    if not any(one["name"] == "dora" for one in operator.get("/api/v1/access/principals")["principals"]):
        operator.post("/api/v1/access/principals", {"name": "dora"})
        operator.post("/api/v1/access/grants", {"principal": "dora", "role": "device-admin", "scope": "/"})
    token = operator.post("/api/v1/access/tokens", {"principal": "dora"})["token"]
    monkeypatch.setenv("GARRISON_URL", served.url)
    monkeypatch.setenv("GARRISON_TOKEN", token)
    monkeypatch.setenv("GARRISON_CA", str(served.ca))

    def run(*words: str) -> tuple[int, str, str]:
        status = main(words)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def document(garrison: Garrison, *words: str) -> Any:
    status, out, err = garrison(*words, "-o", "json")
    assert status == 0, err
    return json.loads(out)


def enrol(served: Served, board: Board, line: str, name: str = "") -> tuple[int, dict[str, Any]]:
    with served.board_http() as http:
        request = board.enrol_request(parse_enrolment(line).token, name=name)
        answer = http.post("/device/v1/enroll", json=request.model_dump())
    return answer.status_code, answer.json()


def test_a_batch_is_made_used_listed_and_ended(served: Served, garrison: Garrison) -> None:
    status, line, said = garrison(
        "device", "token", "create", "--batch", "--uses", "2", "--prefix", "fab-", "--group", "/fab/"
    )
    assert (status, "up to 2 boards, to become fab-1, fab-2" in said) == (0, True)
    assert [enrol(served, Board(), line, "fab-9")[1]["device"], enrol(served, Board(), line)[1]["device"]] == [
        "fab-9",
        "fab-1",
    ]
    (listed,) = [one for one in document(garrison, "device", "token", "list", "--all") if one["name"] == "fab-*"]
    assert (listed["uses"], listed["state"], listed["boards"]) == (2, "used", ["fab-9", "fab-1"])
    status, out, _ = garrison("device", "token", "list", "--all")
    assert (status, "2 of 2" in out) == (0, True)
    status, out, _ = garrison("device", "token", "revoke", str(listed["id"]))
    assert (status, "It had admitted fab-9, fab-1." in out) == (0, True)
    status, _, err = garrison("device", "token", "revoke", "4711")
    assert (status, "device.token_not_found" in err, "garrison device token list" in err) == (4, True, True)


@pytest.mark.parametrize(
    "words",
    [
        ("device", "token", "create"),
        ("device", "token", "create", "x", "--uses", "2"),
        ("device", "token", "create", "x", "--batch", "--uses", "2", "--prefix", "y-"),
        ("device", "token", "create", "--batch", "--prefix", "y-"),
        ("device", "enroll", "approve"),
        ("device", "enroll", "approve", "--request", "request.json"),
        ("device", "enroll", "approve", "0000", "--request", "request.json", "--out", "response.json"),
    ],
)
def test_forms_that_do_not_fit_are_refused_with_the_right_one(garrison: Garrison, words: tuple[str, ...]) -> None:
    status, _, err = garrison(*words)
    assert (status, "hint:" in err) == (2, True)


def test_an_invited_board_waits_for_its_fingerprint(served: Served, garrison: Garrison) -> None:
    status, line, _ = garrison("device", "invite")
    assert (status, parse_enrolment(line).token) == (0, "")
    board, denied = Board(), Board()
    assert enrol(served, board, line, "guest-1") == (202, {"fingerprint": board.fingerprint, "name": "guest-1"})
    enrol(served, denied, line, "guest-2")
    status, out, _ = garrison("device", "enroll", "list")
    assert (board.fingerprint in out, denied.fingerprint in out, "2 waiting" in out) == (True, True, True)
    assert garrison("device", "enroll", "deny", denied.fingerprint)[0] == 0
    assert enrol(served, denied, line)[1]["code"] == "enrolment.denied"
    status, out, _ = garrison("device", "enroll", "approve", board.fingerprint, "--group", "/eu/", "--label", "a=b")
    assert (status, "Approved as guest-1" in out) == (0, True)
    assert enrol(served, board, line)[1]["device"] == "guest-1"
    shown = document(garrison, "device", "show", "guest-1")
    assert (shown["group"], shown["labels"], shown["fingerprint"]) == ("/eu/", {"a": "b"}, board.fingerprint)
    status, _, err = garrison("device", "enroll", "approve", board.fingerprint)
    assert (status, "enrolment.request_not_found" in err) == (4, True)


def test_a_board_without_a_network_is_admitted_by_files(served: Served, garrison: Garrison, tmp_path: Path) -> None:
    board, nonce = Board(), "5a" * 16
    request, out = tmp_path / "request.json", tmp_path / "response.json"
    request.write_text(board.offline_request("attic", nonce).model_dump_json())
    words = ("device", "enroll", "approve", "--request", str(request), "--out", str(out), "--group", "/attic/")
    status, said, err = garrison(*words)
    assert status == 0, err
    answer = OfflineResponse.model_validate_json(out.read_text())
    digest = sha256_hex(answer.root.encode())
    assert f"garrison-agent enroll --response response.json --root-sha256 {digest}" in said
    assert (answer.device, answer.url) == ("attic", served.url)
    director = served.controller.keys.director
    opened = envelope.unseal(answer.anchor.encode(), lambda _: director.public_hex)
    assert parse_message(Anchor, opened.body, device="attic").nonce == nonce
    status, _, err = garrison(*words)
    assert (status, "usage.file_exists" in err) == (2, True)
    request.write_text("no request")
    status, _, err = garrison(*words[:-3], str(tmp_path / "other.json"))
    assert (status, "enrolment.request_malformed" in err) == (2, True)


def test_a_board_is_replaced_under_its_name(served: Served, garrison: Garrison) -> None:
    first, second = Board(), Board()
    _, line, _ = garrison("device", "token", "create", "swap", "--group", "/eu/", "--label", "site=x")
    enrol(served, first, line)
    before = document(garrison, "device", "show", "swap")
    status, line, said = garrison("device", "rotate", "swap")
    assert (status, "the present swap is shut out" in said) == (0, True)
    revoked_list = (served.controller.config.pki_dir / "device-ca.crl").read_bytes()
    assert enrol(served, second, line)[1]["device"] == "swap"
    after = document(garrison, "device", "show", "swap")
    assert [after[key] for key in ("group", "labels", "enrolled_at")] == [
        before[key] for key in ("group", "labels", "enrolled_at")
    ]
    assert (before["fingerprint"], after["fingerprint"]) == (first.fingerprint, second.fingerprint)
    assert [one["fingerprint"] for one in after["earlier_identities"]] == [first.fingerprint]
    assert (served.controller.config.pki_dir / "device-ca.crl").read_bytes() != revoked_list
    status, out, _ = garrison("device", "list", "--filter", "name=swap")
    assert (second.fingerprint in out, after["cert_serial"][:16] in out) == (True, True)
    status, out, _ = garrison("device", "show", "swap")
    assert f"{first.fingerprint}, revoked " in out
    status, _, err = garrison("device", "rotate", "nobody")
    assert (status, "device.not_found" in err) == (4, True)


def test_a_board_renews_and_asks_for_an_anchor(served: Served, garrison: Garrison) -> None:
    board = Board()
    _, line, _ = garrison("device", "token", "create", "renewer")
    enrol(served, board, line)
    with served.board_http() as http:
        nonce = http.get("/device/v1/nonce").json()["nonce"]
        request = board.renew_request("renewer", nonce)
        renewed = http.post("/device/v1/certificate", json=request.model_dump())
        anchor = http.get("/device/v1/anchor", params={"device": "renewer", "nonce": "00" * 16})
        malformed = http.get("/device/v1/anchor", params={"device": "renewer", "nonce": "short"})
        unknown = http.get("/device/v1/anchor", params={"device": "nobody", "nonce": "00" * 16})
    assert (renewed.json()["mqtt_host"], renewed.json()["mqtt_port"]) == ("broker.example", 8883)
    director = served.controller.keys.director
    opened = envelope.unseal(anchor.content, lambda _: director.public_hex)
    assert parse_message(Anchor, opened.body, device="renewer").streams == {}
    assert (malformed.status_code, unknown.json()["code"]) == (422, "device.unknown")
