"""Attacks by whoever has had the stick: on the board that reads it, on the controller, and on those who write it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from garrison_agent.api.commands import GetExport
from garrison_controller.bundles import requests
from garrison_controller.bundles.home import Home, Outcome
from garrison_controller.cli.bundle import _file
from garrison_controller.config import ControllerConfig
from garrison_controller.devices import pki, service
from garrison_controller.devices.sessions import Sessions
from garrison_controller.devices.tables import Device
from garrison_protocol import bundle
from garrison_protocol.bundle import HomeRequest, Kind
from garrison_protocol.envelope import seal
from garrison_protocol.errors import GarrisonError, InvalidError, RefusedError, UnauthenticatedError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import Desired, DesiredAlias
from garrison_protocol.messages.enrolment import RenewRequest, renewal_bytes
from garrison_protocol.messages.streams import Receipt
from garrison_protocol.states import Stream
from garrison_protocol.stick import Stick
from garrison_protocol.topics import Up
from tests.attacks.stick import StickBoard, write_bundle
from tests.fakes.tuf_repository import in_days
from tests.unit.loop.rig import DEVICE, DIRECTOR, RECEIPTS, entry, package
from tests.unit.rollouts.fleet import START, FakeBoard, Fleet

NEW = package("2.0")


def desired(counter: int, *entries: DesiredAlias, device: str = DEVICE, key: SigningKey = DIRECTOR) -> bytes:
    return seal("desired", encode(Desired(device=device, counter=counter, aliases=entries)), key)


@pytest.fixture
def afloat(tmp_path: Path) -> Iterator[StickBoard]:
    """A board that serves ``chat:1.0`` under desired state 1, and is cut off since; ``chat:2.0`` was published then."""
    board = StickBoard(tmp_path / "board")
    board.settle()
    board.connect()
    board.deploy(package("1.0"), "r1")
    board.cut_off()
    board.repository.add(NEW)
    board.repository.publish()
    yield board
    board.database.close()


# --- on the board ----------------------------------------------------------------------------------------------------


def test_older_metadata_on_a_stick(afloat: StickBoard, tmp_path: Path) -> None:
    """Rollback by stick: a genuine bundle from before the newest metadata is brought again."""
    older = write_bundle(tmp_path / "older", afloat, {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))})
    afloat.repository.publish()
    newer = write_bundle(tmp_path / "newer", afloat, {Kind.DESIRED: desired(3, entry(NEW.ref, "r3"))})
    afloat.import_bundle(newer)
    afloat.forward(1)
    before = afloat.standing()
    assert afloat.import_bundle(older) == {
        "metadata": ("older", "registry.rollback"),
        "desired": ("older", "desired.counter_not_newer"),
    }
    assert afloat.standing() == before
    assert afloat.headers("bundle.imported")[-1]["metadata"] == "older"


def test_a_stick_whose_bundle_has_ended(afloat: StickBoard, tmp_path: Path) -> None:
    """Freeze by stick: a bundle is kept back until long after it was good, then brought."""
    afloat.repository.expires["timestamp"] = in_days(3)
    afloat.repository.publish()
    stick = write_bundle(tmp_path / "stick", afloat)
    afloat.clock.forward(5 * 86400)
    before = afloat.standing()
    assert afloat.import_bundle(stick) == {"metadata": ("refused", "registry.expired")}
    assert afloat.standing() == before


def test_a_stick_whose_bundle_has_ended_by_the_floor_alone(afloat: StickBoard, tmp_path: Path) -> None:
    """Freeze by stick and clock put back: what has ended by the signed time alone is neither taken nor called new."""
    afloat.repository.expires["timestamp"] = in_days(3)
    afloat.repository.publish()
    stick = write_bundle(tmp_path / "stick", afloat, {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))})
    afloat.clock.forward(5 * 86400)
    afloat.clock.wall_s -= 5 * 86400
    assert afloat.import_bundle(stick)["metadata"] == ("refused", "registry.expired")
    assert (afloat.state, afloat.models.running) == ("WAITING", ["chat:1.0"])
    assert afloat.parts.trust.view.freshness == "STALE"


def test_a_bundle_that_was_cut_off(afloat: StickBoard, tmp_path: Path) -> None:
    """Partial bundle: the stick was pulled out while it was written; what is there is genuine."""
    stick = write_bundle(tmp_path / "stick", afloat, {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))})
    (stick / bundle.HEAD).unlink()
    before = afloat.standing()
    result = afloat.carry(stick)
    assert isinstance(result, GarrisonError)
    assert result.code == "bundle.incomplete"
    assert afloat.standing() == before


def test_a_bundle_without_its_models(afloat: StickBoard, tmp_path: Path) -> None:
    """Partial bundle: whoever had the stick took the models away; the deployment waits, and a whole stick ends it."""
    files = {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))}
    afloat.import_bundle(write_bundle(tmp_path / "partial", afloat, files, without_blobs=True))
    assert (afloat.state, afloat.models.running) == ("WAITING", ["chat:1.0"])
    afloat.import_bundle(write_bundle(tmp_path / "whole", afloat, files))
    afloat.forward(1)
    assert (afloat.state, afloat.models.running) == ("ACTIVE", ["chat:2.0"])


def test_a_tampered_model_on_a_stick(afloat: StickBoard, tmp_path: Path) -> None:
    """Tampered blob: one byte of the model is changed; nothing is installed, and the attempt is not used up by it."""
    files = {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))}
    bad = write_bundle(tmp_path / "bad", afloat, files)
    file = NEW.variant.files[0]
    blob = bad / bundle.blob_path(file.sha256)
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    afloat.import_bundle(bad)
    assert (afloat.state, afloat.slot.error_code) == ("WAITING", "bundle.damaged")
    assert not afloat.shelf.blobs.has(file.sha256, file.size)
    assert afloat.models.running == ["chat:1.0"]
    afloat.import_bundle(write_bundle(tmp_path / "good", afloat, files))
    afloat.forward(1)
    assert (afloat.state, afloat.models.running) == ("ACTIVE", ["chat:2.0"])


def test_tampered_metadata_on_a_stick(afloat: StickBoard, tmp_path: Path) -> None:
    """Malicious stick: the targets metadata is changed to name another model."""
    stick = write_bundle(tmp_path / "stick", afloat)
    targets = max((stick / "metadata").glob("*.targets.json"))
    targets.write_bytes(targets.read_bytes().replace(b"chat", b"tiny"))
    before = afloat.standing()
    assert afloat.import_bundle(stick)["metadata"] == ("refused", "registry.damaged")
    assert afloat.standing() == before


def test_another_boards_desired_state_on_a_stick(afloat: StickBoard, tmp_path: Path) -> None:
    """Other board's desired state: it is copied into this board's folder."""
    stick = write_bundle(tmp_path / "stick", afloat, {Kind.DESIRED: desired(9, entry(NEW.ref, "r9"), device="edge-2")})
    assert afloat.import_bundle(stick)["desired"] == ("refused", "message.misaddressed")
    assert afloat.refused["message.misaddressed"] == 1
    assert afloat.models.running == ["chat:1.0"]


def test_a_desired_state_of_the_sticks_owner(afloat: StickBoard, tmp_path: Path) -> None:
    """Forged desired state: whoever has the stick signs one with a key of its own."""
    stick = write_bundle(
        tmp_path / "stick", afloat, {Kind.DESIRED: desired(9, entry(NEW.ref, "r9"), key=SigningKey.generate())}
    )
    assert afloat.import_bundle(stick)["desired"] == ("refused", "envelope.key_unknown")
    assert afloat.parts.inbound.applied.counter == 1


def test_receipts_of_another_epoch_on_a_stick(afloat: StickBoard, tmp_path: Path) -> None:
    """Replayed receipts: genuine ones of an earlier life of the board's store would make it forget its record."""
    head = afloat.parts.journal.heads()["audit"]
    assert head.acked < head.seq
    receipt = Receipt(device=DEVICE, stream=Stream.AUDIT, epoch="0" * 16, up_to=head.seq, hash=head.hash)
    stick = write_bundle(tmp_path / "stick", afloat, {Kind.RECEIPT_AUDIT: seal("receipt", encode(receipt), RECEIPTS)})
    assert afloat.import_bundle(stick)["receipt audit"] == ("unchanged", None)
    assert afloat.parts.journal.heads()["audit"].acked == head.acked


def test_an_anchor_that_was_answered_before(afloat: StickBoard, tmp_path: Path) -> None:
    """Replayed anchor: the answer to an earlier export's nonce is brought a second time, to set the time back."""
    page = cast(dict[str, Any], afloat.ask(GetExport("")).result())
    (request,) = (file for file in page["files"] if file["path"].endswith("request.json"))
    nonce = json.loads(base64.b64decode(request["data"]))["nonce"]
    afloat.controller_silent = afloat.work.offline_now = False
    sealed = afloat.anchor(nonce)
    afloat.controller_silent = True
    stick = write_bundle(tmp_path / "stick", afloat, {Kind.ANCHOR: sealed})
    assert afloat.import_bundle(stick)["anchor"] == ("new", None)
    assert afloat.import_bundle(stick)["anchor"] == ("older", "anchor.nonce_unknown")


def test_links_on_a_stick(afloat: StickBoard, tmp_path: Path) -> None:
    """Symbolic links: files and folders of the stick lead to the board's own files, read with root's rights."""
    stick = write_bundle(tmp_path / "stick", afloat, {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))})
    elsewhere = tmp_path / "elsewhere"
    genuine = stick / "blobs"
    genuine.rename(elsewhere)
    genuine.symlink_to(elsewhere)
    stamp = stick / "metadata" / "timestamp.json"
    (tmp_path / "stamp").write_bytes(stamp.read_bytes())
    stamp.unlink()
    stamp.symlink_to(tmp_path / "stamp")
    before = afloat.standing()
    with Stick(stick) as opened:
        for path in ("metadata/timestamp.json", bundle.blob_path(NEW.variant.files[0].sha256)):
            with pytest.raises(RefusedError) as refused:
                opened.read_piece(path, 0, 10)
            assert refused.value.code == "bundle.not_a_file"
    assert afloat.import_bundle(stick)["metadata"] == ("refused", "source.unreachable")
    assert afloat.models.running == ["chat:1.0"]
    assert afloat.standing()[0] == before[0]


def test_what_is_no_file_on_a_stick(tmp_path: Path) -> None:
    """Devices, pipes, and folders in the place of files: reading one would hang, or have effects."""
    (tmp_path / "metadata").mkdir()
    os.mkfifo(tmp_path / "metadata" / "timestamp.json")
    (tmp_path / "metadata" / "1.root.json").mkdir()
    (tmp_path / "bundle.json").symlink_to("/dev/zero")
    with Stick(tmp_path) as stick:
        for path in ("metadata/timestamp.json", "metadata/1.root.json", "bundle.json"):
            with pytest.raises(RefusedError) as refused:
                stick.read(path)
            assert refused.value.code == "bundle.not_a_file"


def test_an_endless_file_on_a_stick(afloat: StickBoard, tmp_path: Path) -> None:
    """Endless data: a metadata file of a terabyte, and a model that goes on behind its end."""
    stick = write_bundle(tmp_path / "stick", afloat, {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))})
    os.truncate(stick / "metadata" / "timestamp.json", 1 << 40)
    before = afloat.standing()
    assert afloat.import_bundle(stick)["metadata"] == ("refused", "source.too_long")
    assert afloat.models.running == ["chat:1.0"]
    again = write_bundle(tmp_path / "again", afloat, {Kind.DESIRED: desired(3, entry(NEW.ref, "r3"))})
    file = NEW.variant.files[0]
    os.truncate(again / bundle.blob_path(file.sha256), 1 << 40)
    afloat.import_bundle(again)
    assert not afloat.shelf.blobs.has(file.sha256, file.size)
    assert afloat.served == before[2]


# --- on those who write to it ----------------------------------------------------------------------------------------


def test_an_export_through_a_link_on_the_stick(tmp_path: Path) -> None:
    """Symbolic links: the stick's ``home`` leads into the system, where root's export would write."""
    system = tmp_path / "system"
    system.mkdir()
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "home").symlink_to(system)
    with Stick(stick) as opened, pytest.raises(GarrisonError) as refused:
        opened.write(bundle.home_path(DEVICE, Kind.STATUS), [b"data"])
    assert refused.value.code == "bundle.not_a_file"
    assert list(system.iterdir()) == []


def test_an_agent_that_names_files_outside_of_the_bundle(tmp_path: Path) -> None:
    """Path traversal: a taken-over agent asks the command line, which runs as root, to read other files to it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "stick").mkdir()
    asked = ["../secret", "/etc/shadow", "metadata/../../secret", "home/edge-1/../../../secret", "bundle.json\x00x"]
    with Stick(tmp_path / "stick") as opened:
        for path in asked:
            with pytest.raises(InvalidError) as refused:
                opened.read_piece(path, 0, 100)
            assert refused.value.code == "bundle.name_unknown"


def test_a_controller_that_names_files_outside_of_the_bundle() -> None:
    """Path traversal: a stolen controller makes the operator's export write elsewhere, or what boards send home."""
    data = base64.b64encode(b"data").decode()
    for path in ("../.ssh/authorized_keys", "/etc/cron.d/x", "targets/" + "a" * 64 + "/../../x"):
        with pytest.raises(InvalidError) as unknown:
            _file(path, data)
        assert unknown.value.code == "bundle.name_unknown"
    with pytest.raises(RefusedError) as foreign:
        _file(bundle.home_path("edge-1", Kind.STATUS), data)
    assert foreign.value.code == "bundle.malformed"


# --- on the controller -----------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Any:
    config = ControllerConfig(state_dir=tmp_path / "pki", public_url="https://127.0.0.1:8443")
    pki.initialise(config, datetime.now(UTC))
    return pki.load_authority(config, pki.DEVICE_CA)


def home_of(fleet: Fleet) -> Home:
    return Home(fleet.database, director=fleet.director, receipt=fleet.receipt_key, now=fleet.clock())


def renewal(board: FakeBoard, number: int, csr_pem: str) -> HomeRequest:
    nonce = f"stick:{number}"
    proof = board.key.sign(renewal_bytes(board.device, nonce, csr_pem)).hex()
    return HomeRequest(
        nonce=f"{number:032x}", renew=RenewRequest(device=board.device, nonce=nonce, csr_pem=csr_pem, proof=proof)
    )


def take(fleet: Fleet, authority: Any, device: str, request: HomeRequest) -> bool:
    with fleet.database.session() as session:
        return requests.take(session, device, request, authority, days=30, grace_days=365, now=fleet.clock())


def csr() -> str:
    from garrison_agent.adapters.certificates import new_key, request_pem

    return request_pem(new_key())


def test_another_boards_rows_in_a_boards_folder(fleet: Fleet) -> None:
    """Foreign rows: what one board sent home is copied into another's folder, to stain its record."""
    thief = fleet.boards["edge-2"]
    thief.record("done.badly")
    taken = home_of(fleet).take("edge-1", Up.AUDIT, thief.seal("audit", thief.batch()))
    assert taken.outcome is Outcome.REFUSED
    assert taken.error is not None
    assert taken.error.code == "envelope.key_unknown"


def test_rows_brought_home_twice_and_with_a_gap(fleet: Fleet) -> None:
    """Replayed rows: one stick is brought home twice, and a file in the middle was taken off another."""
    board = fleet.boards["edge-1"]
    for number in range(6):
        board.record(f"step.{number}")
    home = home_of(fleet)
    first, last = board.seal("audit", board.batch(1, 2)), board.seal("audit", board.batch(5, 6))
    assert home.take("edge-1", Up.AUDIT, first).outcome is Outcome.NEW
    assert home.take("edge-1", Up.AUDIT, first).outcome is Outcome.REPEATED
    assert home.take("edge-1", Up.AUDIT, last).outcome is Outcome.GAP
    assert home.take("edge-1", Up.AUDIT, board.seal("audit", board.batch(3, 6))).outcome is Outcome.NEW


def test_a_stick_makes_no_board_present(fleet: Fleet) -> None:
    """False presence: a status of months ago is brought home, so that a dead board looks alive."""
    board = fleet.boards["edge-1"]
    board.record()
    fleet.send(board, Up.STATUS, board.status(online=False))
    status = board.seal("status", board.status(online=True))
    assert home_of(fleet).take("edge-1", Up.STATUS, status).outcome is Outcome.NEW
    with fleet.database.reading() as session:
        device = session.get_one(Device, "edge-1")
        assert (device.online, device.last_seen_at) == (False, None)


def test_a_recorded_renewal_on_an_old_stick(fleet: Fleet, authority: Any) -> None:
    """Replayed renewal: the request for a stolen TLS key is brought again, to prolong it after the board renewed."""
    board = fleet.boards["edge-1"]
    stolen = renewal(board, 5, csr())
    assert take(fleet, authority, "edge-1", stolen) is True
    assert take(fleet, authority, "edge-1", renewal(board, 6, csr())) is True
    with pytest.raises(RefusedError) as refused:
        take(fleet, authority, "edge-1", stolen)
    assert refused.value.code == "renewal.not_newer"


def test_a_renewal_for_another_board(fleet: Fleet, authority: Any) -> None:
    """Foreign renewal: one board's signed request is put into another's folder, for a certificate in its name."""
    with pytest.raises(RefusedError) as refused:
        take(fleet, authority, "edge-1", renewal(fleet.boards["edge-2"], 5, csr()))
    assert refused.value.code == "message.misaddressed"
    forged = renewal(fleet.boards["edge-2"], 5, csr())
    assert forged.renew is not None
    renamed = forged.model_copy(update={"renew": forged.renew.model_copy(update={"device": "edge-1"})})
    with pytest.raises(RefusedError) as unproven:
        take(fleet, authority, "edge-1", renamed)
    assert unproven.value.code == "renewal.bad_proof"


def test_the_nonce_of_a_renewal_by_stick_at_the_online_door(fleet: Fleet, authority: Any) -> None:
    """Crossed doors: a carried renewal, which anybody with the stick can copy, is sent over HTTP."""
    request = renewal(fleet.boards["edge-1"], 5, csr()).renew
    assert request is not None
    with fleet.database.session() as session, pytest.raises(UnauthenticatedError) as refused:
        service.renew(session, request, Sessions(START.timestamp), authority, days=30, grace_days=365, now=START)
    assert refused.value.code == "session.nonce_invalid"
