"""The import of a bundle, with the real verification, downloads, and owner; attacks are in tests/attacks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from garrison_agent.api.carrier import Carrier
from garrison_agent.api.commands import BeginImport
from garrison_agent.events import Asked
from garrison_agent.owner import bundle_import
from garrison_protocol.bundle import Kind
from garrison_protocol.envelope import seal
from garrison_protocol.errors import ConflictError, GarrisonError
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import Desired, DesiredAlias
from garrison_protocol.messages.enrolment import RenewResponse
from garrison_protocol.messages.streams import Receipt
from garrison_protocol.states import Stream
from tests.attacks.stick import StickBoard, read_for, write_bundle
from tests.fakes.tuf_repository import in_days
from tests.unit.loop.rig import DEVICE, DIRECTOR, RECEIPTS, entry, package

NEW = package("2.0")


def desired(counter: int, *entries: DesiredAlias) -> bytes:
    return seal("desired", encode(Desired(device=DEVICE, counter=counter, aliases=entries)), DIRECTOR)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[StickBoard]:
    """A board that serves ``chat:1.0`` and is cut off; ``chat:2.0`` was published since."""
    board = StickBoard(tmp_path / "board")
    board.settle()
    board.connect()
    board.deploy(package("1.0"), "r1")
    board.cut_off()
    board.repository.add(NEW)
    board.repository.publish()
    yield board
    board.database.close()


def begin(board: StickBoard) -> Carrier:
    answer: Future[object] = Future()
    board.inbox.put(Asked(BeginImport(), answer))
    while not answer.done():
        assert board.step()
    carrier = answer.result()
    assert isinstance(carrier, Carrier)
    return carrier


def test_what_a_stick_holds_is_installed_with_no_network_and_once(board: StickBoard, tmp_path: Path) -> None:
    stick = write_bundle(tmp_path / "stick", board, {Kind.DESIRED: desired(2, entry(NEW.ref, "r2"))})
    result = board.carry(stick)
    assert not isinstance(result, GarrisonError)
    assert [(item["what"], item["outcome"]) for item in result["items"]] == [("metadata", "new"), ("desired", "new")]
    assert [alias["alias"] for alias in result["aliases"]] == ["chat"]
    board.forward(1)
    assert (board.state, board.models.running) == ("ACTIVE", ["chat:2.0"])
    before = board.standing()
    assert board.import_bundle(stick) == {"metadata": ("unchanged", None), "desired": ("unchanged", None)}
    assert board.standing() == before
    assert [one["desired"] for one in board.headers("bundle.imported")] == ["new", "unchanged"]


def test_a_timestamp_that_only_lasts_longer_makes_stale_metadata_fresh(board: StickBoard, tmp_path: Path) -> None:
    repository = board.repository
    board.import_bundle(write_bundle(tmp_path / "first", board))
    version = repository.versions["timestamp"]
    board.clock.forward(10 * 86400)
    board.parts.trust.look()
    board.settle()
    assert board.parts.trust.view.freshness.value == "STALE"
    repository.expires["timestamp"] = in_days(29)
    repository.versions["timestamp"] -= 1
    repository.refresh_timestamp()  # the same version and snapshot, signed again for longer
    assert repository.versions["timestamp"] == version
    assert board.import_bundle(write_bundle(tmp_path / "second", board)) == {"metadata": ("new", None)}
    assert board.parts.trust.view.freshness.value == "FRESH"
    assert board.parts.trust.view.timestamp == version


def test_receipts_and_a_certificate_come_by_stick(board: StickBoard, tmp_path: Path) -> None:
    head = board.parts.journal.heads()["audit"]
    receipt = Receipt(device=DEVICE, stream=Stream.AUDIT, epoch=head.epoch, up_to=head.seq, hash=head.hash)
    renew = RenewResponse(certificate_pem="pem", mqtt_host="h", mqtt_port=1)
    files = {
        Kind.RECEIPT_AUDIT: seal("receipt", encode(receipt), RECEIPTS),
        Kind.RENEWAL: renew.model_dump_json().encode(),
    }
    came = board.import_bundle(write_bundle(tmp_path / "stick", board, files))
    assert (came["receipt audit"], came["certificate"]) == (("new", None), ("new", None))
    assert board.parts.journal.heads()["audit"].acked == head.seq


def test_one_import_at_a_time_and_one_that_was_left_gives_way(
    board: StickBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stick = write_bundle(tmp_path / "stick", board)
    first = begin(board)
    with pytest.raises(ConflictError, match=r"bundle\.busy"):
        begin(board)
    monkeypatch.setattr(bundle_import, "IDLE_S", 0.0)
    second = begin(board)
    assert isinstance(first.result, GarrisonError)
    assert first.result.code == "bundle.reader_gone"
    reader = threading.Thread(target=read_for, args=(second, stick))
    reader.start()
    board.settle()
    reader.join()
    assert isinstance(second.result, dict)


def test_an_agent_that_stops_sends_the_reader_away(board: StickBoard) -> None:
    carrier = begin(board)
    board.parts.imports.stop()
    assert isinstance(carrier.result, GarrisonError)
    assert carrier.result.code == "agent.stopping"
    assert board.plugged.source is None
    board.settle()
