from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from garrison_controller.audit.verify import ChainReport, open_copy, verify
from garrison_controller.cli.audit import app
from garrison_protocol.chain import header_hash
from garrison_protocol.errors import InvalidError, NotFoundError, RefusedError
from garrison_protocol.states import Stream
from garrison_protocol.topics import Up
from tests.unit.rollouts.fleet import Fleet


@pytest.fixture
def filled(fleet: Fleet) -> Fleet:
    for board in fleet.boards.values():
        for number in range(20):
            board.record("inference.segment", {"n": number}, count=number)
            board.measure(requests=number)
        fleet.send(board, Up.AUDIT, board.batch())
        fleet.send(board, Up.TELEMETRY, board.batch(1, 5, stream=Stream.TELEMETRY))
        fleet.send(board, Up.TELEMETRY, board.batch(9, stream=Stream.TELEMETRY, dropped=3))
    return fleet


def reports(fleet: Fleet, device: str | None = None) -> list[ChainReport]:
    with fleet.database.reading() as session:
        return verify(session, device)


def test_every_chain_of_every_board_holds(filled: Fleet) -> None:
    found = reports(filled)
    assert [(report.device, report.stream, report.rows, report.ok) for report in found] == [
        (device, stream, rows, True)
        for device in ("edge-1", "edge-2", "edge-3")
        for stream, rows in (("audit", 20), ("telemetry", 17))
    ]


@pytest.mark.parametrize(
    ("statement", "seq", "what"),
    [
        ("UPDATE stream_row SET header = replace(header, '\"count\":6', '\"count\":7') WHERE {row}", 7, "header"),
        ("UPDATE stream_row SET body = '{{\"n\":99}}' WHERE {row}", 7, "body was altered"),
        ("UPDATE stream_row SET hash = '" + "0" * 64 + "' WHERE {row}", 7, "header does not match its hash"),
        ("DELETE FROM stream_row WHERE {row}", 7, "entry 7 is missing"),
        ("DELETE FROM stream_row WHERE device_id = 'edge-2' AND stream = 'audit' AND seq > 15", 16, "16 to 20"),
        ("UPDATE stream_state SET up_to = 19 WHERE device_id = 'edge-2' AND stream = 'audit'", 20, "entry 19"),
        (
            "DELETE FROM stream_row WHERE device_id='edge-2' AND stream='telemetry' AND seq=2",
            20,
            "1 entries are missing",
        ),
    ],
)
def test_the_first_bad_entry_is_named(filled: Fleet, statement: str, seq: int, what: str) -> None:
    row = "device_id = 'edge-2' AND stream = 'audit' AND seq = 7"
    with filled.database.session() as session:
        session.execute(text(statement.format(row=row).replace(":", "\\:")))
    bad = [report for report in reports(filled) if not report.ok]
    (report,) = bad
    assert report.device == "edge-2"
    assert report.fault is not None
    assert report.fault.seq == seq
    assert what in report.fault.what


def test_a_consistently_rewritten_entry_breaks_the_link_behind_it(filled: Fleet) -> None:
    with filled.database.session() as session:
        query = "SELECT header FROM stream_row WHERE device_id='edge-1' AND stream='audit' AND seq=7"
        header = session.execute(text(query)).scalar_one().replace('"count":6', '"count":5')
        session.execute(
            text(
                "UPDATE stream_row SET header = :header, hash = :hash"
                " WHERE device_id='edge-1' AND stream='audit' AND seq=7"
            ),
            {"header": header, "hash": header_hash(header)},
        )
    (report,) = [report for report in reports(filled, "edge-1") if not report.ok]
    assert report.fault is not None
    assert (report.fault.seq, report.fault.what) == (8, "the entry does not follow the one before it")


def test_an_erased_body_still_verifies(filled: Fleet) -> None:
    with filled.database.session() as session:
        session.execute(text("UPDATE stream_row SET body = NULL, salt = NULL WHERE seq = 5"))
    assert all(report.ok for report in reports(filled))


@pytest.fixture
def copy(filled: Fleet, tmp_path: Path) -> Path:
    target = tmp_path / "copy of it.db"
    with sqlite3.connect(tmp_path / "controller.db") as source, sqlite3.connect(target) as destination:
        source.backup(destination)
    source.close()
    destination.close()
    return target


def test_a_copy_is_verified_without_a_controller_and_without_changing_it(copy: Path) -> None:
    before = copy.read_bytes()
    result = CliRunner().invoke(app, ["verify", "--database", str(copy), "-o", "json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["ok"]
    assert len(document["chains"]) == 6
    assert copy.read_bytes() == before
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith("copy")] == [copy.name]


def test_an_altered_copy_names_the_entry_and_ends_with_status_6(copy: Path) -> None:
    with sqlite3.connect(copy) as connection:
        connection.execute(
            "UPDATE stream_row SET body = '{}' WHERE device_id = 'edge-3' AND stream = 'audit' AND seq = 11"
        )
    connection.close()
    result = CliRunner().invoke(app, ["verify", "--database", str(copy)])
    assert isinstance(result.exception, RefusedError)
    assert result.exception.exit_status == 6
    assert "edge-3 audit epoch 00000000000000aa entry 11: the body was altered" in result.exception.message
    assert "BAD" in result.stdout


def test_a_copy_with_its_write_ahead_log_is_read_whole(filled: Fleet, tmp_path: Path) -> None:
    board = filled.boards["edge-1"]
    board.record("late")
    filled.send(board, Up.AUDIT, board.batch(21))
    folder = tmp_path / "copied"
    folder.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"controller.db{suffix}", folder / f"controller.db{suffix}")
    with open_copy(folder / "controller.db") as session:
        first = verify(session, "edge-1")[0]
    assert (first.rows, first.ok) == (21, True)


def test_files_that_are_no_database_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError), open_copy(tmp_path / "absent.db"):
        pass
    text_file = tmp_path / "text.db"
    text_file.write_text("no database" * 1000)
    with pytest.raises(InvalidError), open_copy(text_file) as session:
        verify(session)


def test_a_chain_whose_state_was_removed_is_missed(filled: Fleet) -> None:
    database = sqlite3.connect(str(filled.database.engine.url.database))  # without foreign keys, as sqlite3's shell
    with database:
        database.execute("DELETE FROM stream_state WHERE device_id = 'edge-2'")
        database.execute("DELETE FROM stream_state WHERE device_id = 'edge-3'")
        database.execute("DELETE FROM stream_row WHERE device_id = 'edge-3'")
    database.close()
    bad = [(report.device, report.stream) for report in reports(filled) if not report.ok]
    assert bad == [("edge-2", "audit"), ("edge-2", "telemetry"), ("edge-3", "audit")]
    assert all(report.ok for report in reports(filled, "edge-1"))


@pytest.mark.parametrize("change", ["kind = 'harmless'", "time_ms = 0"])
def test_columns_that_hide_an_entry_from_queries_are_compared_with_its_header(filled: Fleet, change: str) -> None:
    with filled.database.session() as session:
        session.execute(
            text(f"UPDATE stream_row SET {change} WHERE device_id = 'edge-2' AND stream = 'audit' AND seq = 7")
        )
    (report,) = [report for report in reports(filled) if not report.ok]
    assert report.fault is not None
    assert (report.device, report.fault.seq) == ("edge-2", 7)
