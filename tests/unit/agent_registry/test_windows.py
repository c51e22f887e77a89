"""What a transfer asks for, keeps, and forgets: tables and a random walk, with no clock."""

from __future__ import annotations

import random

import pytest

from garrison_agent.registry.windows import (
    AHEAD_BYTES,
    FIRST_WINDOW_BYTES,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
    OUTSTANDING,
    Window,
    Windows,
)
from garrison_protocol.messages.fetch import Chunk, ChunkStatus
from tests.fakes.packages import noise

TOTAL = 1_000_003
DATA = noise(TOTAL)


def chunks(request: str, window: Window, data: bytes = DATA) -> list[Chunk]:
    end = min(window.end, len(data))
    starts = range(window.offset, end, window.piece) or [window.offset]
    return [Chunk(request, at, len(data), ChunkStatus.DATA, data[at : min(at + window.piece, end)]) for at in starts]


def ask(windows: Windows, request: str = "00", now_s: float = 0) -> Window:
    window = windows.next_window()
    assert window is not None
    windows.asked(request, window, now_s)
    return window


def begun() -> tuple[Windows, Window]:
    """Return a transfer whose first window was asked for under ``00``."""
    windows = Windows()
    return windows, ask(windows)


def drain(windows: Windows) -> bytes:
    taken = b""
    while (piece := windows.pop()) is not None:
        taken += piece
    return taken


def test_one_window_until_the_length_is_known_then_two() -> None:
    windows, first = begun()
    assert first == Window(0, FIRST_WINDOW_BYTES, FIRST_WINDOW_BYTES // 4)
    assert windows.next_window() is None
    assert windows.take(chunks("00", first)[0], 0)
    second = ask(windows, "01")
    assert second.offset == first.end
    assert windows.next_window() is None


def test_pieces_in_any_order_come_out_in_order() -> None:
    windows, first = begun()
    for chunk in reversed(chunks("00", first)):
        assert windows.take(chunk, 0)
    assert drain(windows) == DATA[: first.length]
    assert windows.outstanding == ()


def test_a_piece_twice_counts_once() -> None:
    windows, first = begun()
    chunk, *_ = chunks("00", first)
    assert windows.take(chunk, 0)
    assert not windows.take(chunk, 0)
    assert windows.pop() == chunk.data
    assert not windows.take(chunk, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"request": "ff"},
        {"offset": 1},
        {"offset": FIRST_WINDOW_BYTES},
        {"offset": TOTAL + 1},
        {"data": DATA[: FIRST_WINDOW_BYTES // 4 - 1]},
        {"data": DATA[: FIRST_WINDOW_BYTES // 4 + 1]},
        {"data": b""},
        {"total": 0},
        {"total": 10},
    ],
)
def test_what_is_no_piece_of_the_window_changes_nothing(wrong: dict[str, object]) -> None:
    windows, first = begun()
    good = chunks("00", first)[0]
    assert not windows.take(Chunk(**{name: getattr(good, name) for name in Chunk.__slots__} | wrong), 0)
    assert windows.total is None
    assert windows.pop() is None
    assert windows.take(good, 0)


def test_another_length_within_one_transfer_is_not_believed() -> None:
    windows, first = begun()
    one, two, *_ = chunks("00", first)
    assert windows.take(one, 0)
    assert not windows.take(Chunk("00", two.offset, TOTAL - 1, two.status, two.data), 0)
    assert windows.take(two, 0)


def test_nothing_at_or_behind_the_end() -> None:
    for offset in (TOTAL, TOTAL + 5):
        windows = Windows(offset)
        window = ask(windows)
        assert windows.take(Chunk("00", window.offset, TOTAL, ChunkStatus.DATA, b""), 0)
        assert windows.done
        assert windows.next_window() is None


def test_windows_grow_while_they_are_filled_fast_and_shrink_when_not() -> None:
    data = bytes(32 * 1024 * 1024)
    windows = Windows()
    lengths = []

    def fill(took_s: float) -> None:
        window = ask(windows)
        lengths.append(window.length)
        for chunk in chunks("00", window, data):
            windows.take(chunk, took_s)
        drain(windows)

    for _ in range(7):
        fill(0.5)
    assert lengths[:3] == [FIRST_WINDOW_BYTES, 2 * FIRST_WINDOW_BYTES, 4 * FIRST_WINDOW_BYTES]
    assert lengths[-1] == MAX_WINDOW_BYTES
    fill(2)
    fill(60)
    fill(60)
    assert lengths[-3:] == [MAX_WINDOW_BYTES, MAX_WINDOW_BYTES, MAX_WINDOW_BYTES // 2]


def test_a_lost_piece_is_asked_for_again_once_the_next_window_is_whole() -> None:
    windows, first = begun()
    lost, *others = chunks("00", first)
    for chunk in others:
        windows.take(chunk, 0)
    second = ask(windows, "01")
    for chunk in chunks("01", second):
        windows.take(chunk, 0)
    assert windows.outstanding == ()
    gap = ask(windows, "02")
    assert (gap.offset, gap.length) == (lost.offset, len(lost.data))
    assert not windows.take(lost, 0)
    assert windows.take(chunks("02", gap)[0], 0)
    assert drain(windows) == DATA[: second.end]


def test_after_a_stall_the_rest_is_asked_for_in_smaller_windows() -> None:
    windows, first = begun()
    kept = chunks("00", first)[1]
    windows.take(kept, 0)
    windows.forget()
    assert windows.outstanding == ()
    again = ask(windows, "01")
    assert (again.offset, again.end) == (0, kept.offset)
    assert again.length <= FIRST_WINDOW_BYTES // 4
    windows.forget()
    windows.forget()
    assert ask(windows, "02").length == MIN_WINDOW_BYTES


def test_a_length_that_was_a_lie_is_forgotten_with_a_stall() -> None:
    windows, first = begun()
    assert windows.take(Chunk("00", 0, 2**60, ChunkStatus.DATA, DATA[: first.piece]), 0)
    assert windows.pop()
    windows.forget()
    window = ask(windows, "01")
    assert windows.take(chunks("01", window)[0], 0)
    assert windows.total == TOTAL


@pytest.mark.parametrize("seed", range(30))
def test_any_loss_and_any_order_ends_with_the_right_bytes_and_bounded_memory(seed: int) -> None:
    chance = random.Random(seed)
    offset = chance.choice([0, 1, 65_536, 999_999])
    windows = Windows(offset)
    on_the_way: list[Chunk] = []
    out = b""
    asked = 0
    while not windows.done:
        while (window := windows.next_window()) is not None:
            asked += 1
            windows.asked(f"{asked:02x}", window, 0)
            on_the_way += chunks(f"{asked:02x}", window)
        assert len(windows.outstanding) <= OUTSTANDING
        chance.shuffle(on_the_way)
        arriving, on_the_way = on_the_way[: chance.randint(0, 4)], on_the_way[4:]
        for chunk in arriving:
            if chance.random() > 0.2:
                windows.take(chunk, 0)
                if chance.random() < 0.2:
                    assert not windows.take(chunk, 0)
        assert sum(len(data) for data in windows._held.values()) <= AHEAD_BYTES
        out += drain(windows)
        if not on_the_way and not windows.done:
            windows.forget()
    assert out == DATA[offset:]
