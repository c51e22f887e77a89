"""The controller's answers to fetches: who gets one, in which turn, within which bounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import select

from garrison_controller.audit.tables import Refusal
from garrison_controller.bus.fetch import FETCHES_PER_S, IN_TOTAL, MAX_FETCH_BYTES, PER_BOARD, Fetches
from garrison_controller.devices.tables import REVOKED, Device
from garrison_protocol import envelope, topics
from garrison_protocol.errors import NotFoundError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.fetch import (
    FETCH_KIND,
    Chunk,
    ChunkStatus,
    Fetch,
    FetchRefusal,
    unpack_chunk,
)
from garrison_protocol.messages.report import STATUS_KIND
from garrison_protocol.topics import Down
from tests.integration.controllers import wait_until
from tests.unit.rollouts.fleet import FakeBoard, Fleet

DATA = bytes(range(256)) * 400
PIECE = 4096
SHA = "a" * 64


@dataclass
class Answers:
    path: Path
    opened: list[Fetch] = field(default_factory=list)

    def file(self, fetch: Fetch) -> Path:
        self.opened.append(fetch)
        if fetch.name == "missing.json":
            raise NotFoundError("registry.metadata_not_found", "no such metadata")
        return self.path

    def document(self, fetch: Fetch) -> bytes:
        self.opened.append(fetch)
        return fetch.body.encode()


class Rig:
    """Fetches whose frames are collected; while ``go`` is not set, the first one waits for room."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet = fleet
        self.answers = Answers(folder / "file")
        self.answers.path.write_bytes(DATA)
        self.frames: list[tuple[str, Chunk]] = []
        self.sending: list[str] = []
        """The board of each frame whose sending began."""
        self.go = threading.Event()
        self.go.set()
        self.connected = True
        self.now_s = 0.0
        self.fetches = Fetches(
            fleet.database, self.answers, send=self._send, now=fleet.clock, monotonic_s=lambda: self.now_s
        )

        self.board = next(iter(fleet.boards.values()))
        self.started = False

    def start(self) -> None:
        self.fetches.start()
        self.started = True

    def _send(self, topic: str, frame: bytes) -> bool:
        place = topics.parse(topic)
        assert place.kind is Down.CHUNK
        self.sending.append(place.device)
        self.go.wait()
        if self.connected:
            self.frames.append((place.device, unpack_chunk(frame)))
        return self.connected

    def ask(
        self, board: FakeBoard, *, device: str | None = None, key: SigningKey | None = None, **what: object
    ) -> bool:
        fetch = Fetch.model_validate(
            {"device": board.device, "request": "0" * 16, "kind": "blob", "sha256": SHA, "piece": PIECE} | what
        )
        sealed = envelope.seal(FETCH_KIND, encode(fetch), key or board.key)
        return self.fetches.offer(device or board.device, sealed)

    def until_frames(self, count: int) -> list[tuple[str, Chunk]]:
        wait_until(lambda: len(self.frames) >= count, f"{count} frames")
        return self.frames

    def refusals(self) -> dict[tuple[str, str], int]:
        with self.fleet.database.reading() as session:
            return {(row.sender, row.code): row.count for row in session.scalars(select(Refusal))}


@pytest.fixture
def rig(fleet: Fleet, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(fleet, tmp_path)
    yield rig
    rig.go.set()
    if rig.started:
        rig.fetches.stop()


def test_a_window_comes_in_pieces(rig: Rig) -> None:
    rig.start()
    rig.ask(rig.board, offset=100, length=10_000)
    frames = [chunk for _, chunk in rig.until_frames(3)]
    assert [(chunk.offset, len(chunk.data)) for chunk in frames] == [(100, 4096), (4196, 4096), (8292, 1808)]
    assert b"".join(chunk.data for chunk in frames) == DATA[100:10_100]
    assert {(chunk.total, chunk.status, chunk.request) for chunk in frames} == {(len(DATA), 0, "0" * 16)}


@pytest.mark.parametrize("offset", [len(DATA), len(DATA) + 10])
def test_behind_the_end_there_is_one_empty_piece(rig: Rig, offset: int) -> None:
    rig.start()
    rig.ask(rig.board, offset=offset)
    assert rig.until_frames(1)[0][1] == Chunk("0" * 16, offset, len(DATA), ChunkStatus.DATA, b"")


def test_a_document_comes_whole_or_not_at_all(rig: Rig) -> None:
    rig.start()
    board = rig.board
    rig.ask(board, kind="certificate", body="x" * 5000, piece=8192)
    assert rig.until_frames(1)[0][1].data == b"x" * 5000
    rig.ask(board, kind="certificate", body="x" * 5000, piece=PIECE)
    assert refusal(rig.until_frames(2)[1][1]).code == "fetch.window_too_small"


def test_what_is_not_there_and_who_is_revoked_get_an_error(rig: Rig) -> None:
    rig.start()
    board = rig.board
    rig.ask(board, kind="metadata", name="missing.json")
    missing = refusal(rig.until_frames(1)[0][1])
    assert (missing.code, missing.status) == ("registry.metadata_not_found", 404)
    with rig.fleet.database.session() as session:
        session.get_one(Device, board.device).state = REVOKED
    rig.ask(board)
    revoked = refusal(rig.until_frames(2)[1][1])
    assert (revoked.code, revoked.status) == ("device.revoked", 403)
    assert revoked.hint


def test_a_file_that_cannot_be_read_is_an_error_for_later(rig: Rig) -> None:
    rig.start()
    rig.answers.path = rig.answers.path.with_name("gone")
    rig.ask(rig.board)
    failed = refusal(rig.until_frames(1)[0][1])
    assert (failed.code, failed.retryable, failed.status) == ("fetch.failed", True, 503)


def test_whoever_is_not_the_board_gets_no_answer_and_is_counted(rig: Rig) -> None:
    rig.start()
    one, two, *_ = rig.fleet.boards.values()
    rig.ask(one, key=SigningKey.generate())
    rig.ask(one, device=two.device)
    rig.fetches.offer("edge-9", b"{}")
    rig.fetches.offer(one.device, b"no envelope")
    rig.fetches.offer(one.device, envelope.seal(STATUS_KIND, encode(one.status()), one.key))
    expected = {
        (one.device, "envelope.key_unknown"): 1,
        (two.device, "envelope.key_unknown"): 1,
        ("", "device.unknown"): 1,
        (one.device, "envelope.malformed"): 1,
        (one.device, "message.misplaced"): 1,
    }
    wait_until(lambda: rig.refusals() == expected, "the refusals")
    assert rig.frames == []
    assert rig.answers.opened == []


def test_refusals_are_written_at_most_once_a_minute(rig: Rig) -> None:
    rig.start()
    board = rig.board
    for now_s in (0, 1, 2, 61):
        rig.now_s = now_s
        rig.fetches.offer(board.device, b"no envelope")
        wait_until(lambda: not rig.fetches._boards, "the workers")
    assert rig.refusals() == {(board.device, "envelope.malformed"): 4}


def test_boards_take_turns_piece_by_piece(rig: Rig) -> None:
    rig.go.clear()
    greedy, modest, *_ = rig.fleet.boards.values()
    rig.start()
    for number in range(PER_BOARD):
        assert rig.ask(greedy, request=f"{number:016x}", length=20 * PIECE)
    wait_until(lambda: bool(rig.sending), "the first piece")
    rig.ask(modest, length=3 * PIECE)
    wait_until(lambda: modest.device in rig.fetches._to_send.boards, "the other board's turn")
    assert rig.sending == [greedy.device]  # never two at once: the link would choose between them
    rig.go.set()
    rig.until_frames(PER_BOARD * 20 + 3)
    order = [device for device, _ in rig.frames]
    assert order == [greedy.device, modest.device] * 3 + [greedy.device] * (PER_BOARD * 20 - 3)
    requests = [chunk.request for device, chunk in rig.frames if device == greedy.device]
    assert requests == sorted(requests)


def test_one_board_cannot_fill_the_queue(rig: Rig) -> None:
    one, two, *_ = rig.fleet.boards.values()
    taken = [rig.ask(one) for _ in range(50)]
    assert taken == [True] * PER_BOARD + [False] * (50 - PER_BOARD)
    assert rig.ask(two)
    assert not rig.fetches.offer("edge-9", bytes(MAX_FETCH_BYTES + 1))


def test_all_boards_together_are_bounded(rig: Rig) -> None:
    taken = sum(rig.fetches.offer(f"edge-{number}", b"{}") for number in range(IN_TOTAL + 100))
    assert taken == IN_TOTAL


def test_a_board_that_asks_too_often_is_not_heard_for_a_moment(rig: Rig) -> None:
    board = rig.board
    rig.start()
    for _ in range(round(FETCHES_PER_S)):
        assert rig.fetches.offer(board.device, b"no envelope")
        wait_until(lambda: not rig.fetches._boards, "the workers")
    assert not rig.ask(board)
    rig.now_s = 2 / FETCHES_PER_S
    assert rig.ask(board, length=PIECE)
    rig.until_frames(1)


def test_without_a_connection_the_rest_of_a_window_is_dropped(rig: Rig) -> None:
    rig.connected = False
    rig.start()
    rig.ask(rig.board)
    wait_until(lambda: bool(rig.answers.opened) and not rig.fetches._boards, "the workers")
    assert rig.frames == []


def refusal(chunk: Chunk) -> FetchRefusal:
    assert chunk.status is ChunkStatus.ERROR
    return FetchRefusal.model_validate_json(chunk.data)
