from __future__ import annotations

import base64
from typing import cast

import pytest

from garrison_agent.api.commands import ExportPage, GetExport
from garrison_protocol import bundle
from garrison_protocol.bundle import HomeRequest, Kind
from garrison_protocol.envelope import unseal
from garrison_protocol.errors import InvalidError, UnavailableError
from garrison_protocol.messages.report import Status
from garrison_protocol.messages.streams import Batch
from garrison_protocol.states import Stream
from tests.unit.loop.rig import BOARD, DEVICE, Rig, package


def export(rig: Rig) -> dict[str, bytes]:
    """Return every file of an export by its path."""
    files, cursor = dict[str, bytes](), ""
    while True:
        page = cast(ExportPage, rig.ask(GetExport(cursor)).result())
        files |= {file["path"]: base64.b64decode(file["data"]) for file in page["files"]}
        if page["next"] is None:
            return files
        cursor = page["next"]


def batches(files: dict[str, bytes], kind: Kind) -> list[Batch]:
    found = sorted(path for path in files if bundle.parse(path).kind is kind)
    return [Batch.model_validate_json(unseal(files[path], lambda _signer: BOARD.public_hex).body) for path in found]


def request(files: dict[str, bytes]) -> HomeRequest:
    return HomeRequest.model_validate_json(files[bundle.home_path(DEVICE, Kind.REQUEST)])


def test_an_export_holds_everything_that_no_receipt_covers(rig: Rig) -> None:
    rig.deploy(package("1.0"), "r1")
    for _ in range(1200):
        rig.parts.journal.append(Stream.AUDIT, "test.row", {})
    files = export(rig)
    status = unseal(files[bundle.home_path(DEVICE, Kind.STATUS)], lambda _signer: BOARD.public_hex)
    heads = Status.model_validate_json(status.body).heads
    rows = batches(files, Kind.AUDIT)
    assert [batch.first for batch in rows] == [1, 501, 1001]
    last = rows[-1].first + len(rows[-1].rows) - 1
    assert last == heads["audit"].seq
    assert rig.headers("bundle.exported")[0]["n"] == last
    assert bundle.home_path(DEVICE, Kind.REPORT) in files


def test_rows_that_a_receipt_covers_stay_at_home(rig: Rig) -> None:
    rig.deploy(package("1.0"), "r1")
    (first,) = batches(export(rig), Kind.AUDIT)
    rig.receipt(first)
    (second,) = batches(export(rig), Kind.AUDIT)
    assert second.first == first.first + len(first.rows)


def test_each_export_asks_anew_and_only_the_last_question_is_open(rig: Rig) -> None:
    first, second = request(export(rig)), request(export(rig))
    assert first.nonce != second.nonce
    assert rig.parts.anchors.take(rig.anchor(second.nonce)).nonce == second.nonce


def test_a_certificate_is_asked_for_when_it_is_due_with_growing_numbers(rig: Rig) -> None:
    assert request(export(rig)).renew is None
    rig.work.offline_now = rig.controller_silent = True
    rig.clock.forward(29 * 86400)
    numbers = []
    for _ in range(2):
        renew = request(export(rig)).renew
        assert renew is not None
        found = bundle.RENEWAL_NONCE.fullmatch(renew.nonce)
        assert found is not None
        numbers.append(int(found[1]))
    assert numbers[1] > numbers[0] >= int(rig.clock.wall_s) - 1


def test_a_certificate_that_cannot_be_asked_for_keeps_nothing_else_at_home(rig: Rig) -> None:
    rig.work.offline_now = rig.controller_silent = True
    rig.clock.forward(29 * 86400)
    rig.renewals.error = UnavailableError("certificate.process_failed", "no memory", retryable=True)
    files = export(rig)
    assert request(files).renew is None
    assert any("/audit/" in path for path in files)
    assert rig.headers("bundle.exported")[-1]["renew_error"] == "certificate.process_failed"


@pytest.mark.parametrize("cursor", ["audit", "audit:", "audit:-1", "other:1", "audit:" + "1" * 17])
def test_a_cursor_that_is_none(rig: Rig, cursor: str) -> None:
    with pytest.raises(InvalidError) as refused:
        rig.ask(GetExport(cursor)).result()
    assert refused.value.code == "bundle.cursor_malformed"
