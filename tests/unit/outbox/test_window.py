from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from garrison_agent.outbox.window import MAX_IN_FLIGHT, RESEND_AFTER_MAX_S, RESEND_AFTER_S, Flight, SendWindow

EPOCH = "0123456789abcdef"


def online(acked: int = 0) -> SendWindow:
    return SendWindow.start(EPOCH, acked).connected()


def send(window: SendWindow, head: int, now: float, size: int = 10) -> SendWindow:
    """Send batches of ``size`` rows as long as the window lets."""
    while (after := window.next_after(head)) is not None:
        window = window.sent(min(after + size, head), now)
    return window


def test_offline_sends_nothing() -> None:
    assert SendWindow.start(EPOCH, 3).next_after(10) is None
    assert online(3).disconnected().next_after(10) is None


def test_sends_behind_what_is_acknowledged_and_at_most_four_batches() -> None:
    window = online(acked=3)
    assert window.next_after(3) is None
    assert window.next_after(100) == 3
    window = send(window, 100, 0.0)
    assert [flight.last for flight in window.flights] == [13, 23, 33, 43]
    assert window.cursor == 43


def test_a_receipt_frees_the_batches_it_covers() -> None:
    window = send(online(), 100, 0.0).received(EPOCH, 20, False, 1.0)
    assert [flight.last for flight in window.flights] == [30, 40]
    assert (window.acked, window.cursor) == (20, 40)
    assert window.next_after(100) == 40


def test_a_receipt_inside_a_batch_frees_only_those_before_it() -> None:
    window = send(online(), 100, 0.0).received(EPOCH, 15, False, 1.0)
    assert [flight.last for flight in window.flights] == [20, 30, 40]


def test_a_receipt_beyond_the_cursor_skips_what_the_controller_has() -> None:
    assert online(10).received(EPOCH, 30, False, 0.0).next_after(50) == 30


def test_old_and_repeated_receipts_change_nothing() -> None:
    window = send(online(), 100, 0.0).received(EPOCH, 20, False, 1.0)
    assert window.received(EPOCH, 20, False, 2.0) == window
    assert window.received(EPOCH, 5, False, 2.0) == window


@pytest.mark.parametrize("resend", [False, True])
def test_another_epoch_changes_nothing(resend: bool) -> None:
    window = send(online(), 100, 0.0)
    assert window.received("f" * 16, 20, resend, 1.0) == window


def test_a_reconnect_begins_again_behind_what_is_acknowledged() -> None:
    window = send(online(), 100, 0.0).received(EPOCH, 20, False, 1.0).disconnected()
    assert window.next_after(100) is None
    window = window.connected()
    assert window.next_after(100) == 20
    assert window.flights == ()


def test_nothing_confirmed_in_time_goes_again_one_batch_at_a_time_and_slower() -> None:
    window = send(online(), 100, 0.0)
    waits = []
    now = 0.0
    for _ in range(6):
        deadline = window.deadline
        assert deadline is not None
        assert window.tick(deadline - 0.001) == window
        waits.append(deadline - now)
        now = deadline
        window = send(window.tick(now), 100, now)
        assert [flight.last for flight in window.flights] == [10]
    assert waits == [RESEND_AFTER_S * 2**number for number in range(5)] + [RESEND_AFTER_MAX_S]
    window = window.received(EPOCH, 10, False, now)
    assert window.timeouts == 0
    assert len(send(window, 100, now).flights) == MAX_IN_FLIGHT


def test_progress_puts_the_deadline_off() -> None:
    window = send(online(), 100, 0.0).received(EPOCH, 10, False, 9.0)
    assert window.deadline == 9.0 + RESEND_AFTER_S


def test_without_batches_under_way_there_is_no_deadline() -> None:
    assert online().deadline is None
    assert online().tick(1e9) == online()


def test_a_request_to_resend_rewinds_once_for_the_batches_behind_a_lost_one() -> None:
    window = send(online(), 100, 0.0)
    window = window.received(EPOCH, 10, True, 1.0)
    assert (window.cursor, window.flights) == (10, ())
    window = send(window, 100, 1.0)
    assert window.received(EPOCH, 10, True, 2.0) == window
    late = window.received(EPOCH, 10, True, 1.0 + window.resend_after_s)
    assert late.cursor == 10
    other = window.received(EPOCH, 20, True, 2.0)
    assert (other.acked, other.cursor, other.rewound) == (20, 20, Flight(20, 2.0))


def test_a_controller_restored_from_a_backup_gets_acknowledged_rows_again() -> None:
    window = send(online(), 40, 0.0).received(EPOCH, 40, False, 1.0)
    assert window.next_after(40) is None
    window = window.received(EPOCH, 5, True, 2.0)
    assert window.next_after(40) == 5
    assert window.disconnected().connected().next_after(40) == 5


class Controller:
    """Takes rows in order, answers every batch, as docs/protocol.md says."""

    def __init__(self) -> None:
        self.up_to = 0

    def take(self, after: int, last: int) -> tuple[int, bool]:
        if after > self.up_to:
            return self.up_to, True
        self.up_to = max(self.up_to, last)
        return self.up_to, False


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), head=st.integers(1, 60), loss=st.floats(0.0, 0.8))
def test_every_row_arrives_over_a_link_that_loses_doubles_reorders_and_breaks(
    seed: int, head: int, loss: float
) -> None:
    chance = random.Random(seed)
    controller = Controller()
    window = online()
    up: deque[tuple[int, int]] = deque()
    down: deque[tuple[int, bool]] = deque()
    now = 0.0
    for step in range(20_000):
        if window.acked == head:
            break
        quiet = step > 2_000  # then the link behaves, so that the end must come
        now += chance.uniform(0, 3)
        window = window.tick(now)
        while (after := window.next_after(head)) is not None:
            last = min(after + chance.randint(1, 7), head)
            window = window.sent(last, now)
            if quiet or chance.random() > loss:
                up.extend([(after, last)] * (1 if quiet or chance.random() < 0.8 else 2))
        assert len(window.flights) <= MAX_IN_FLIGHT
        assert window.acked <= window.cursor <= head
        assert window.acked <= controller.up_to
        if not quiet and chance.random() < 0.2:
            chance.shuffle(up)
            chance.shuffle(down)
        if up:
            down.append(controller.take(*up.popleft()))
        if down and (quiet or chance.random() > loss):
            up_to, resend = down.popleft()
            window = window.received(EPOCH, up_to, resend, now)
        if not quiet and chance.random() < 0.02:
            up.clear()
            window = window.disconnected().connected()
        if not quiet and chance.random() < 0.01:
            window = SendWindow.start(EPOCH, window.acked).connected()  # the agent was killed and started again
    assert window.acked == controller.up_to == head


def test_every_short_history_keeps_the_windows_promises() -> None:
    """All sequences of seven events over a stream of six rows, from every start."""
    head = 6
    states = {online(acked) for acked in (0, 2)} | {SendWindow.start(EPOCH, 1)}
    seen = set(states)
    for depth in range(7):
        now = depth * RESEND_AFTER_S
        following: set[SendWindow] = set()
        for window in states:
            following |= {window.connected(), window.disconnected(), window.tick(now)}
            after = window.next_after(head)
            if after is not None:
                following |= {window.sent(last, now) for last in range(after + 1, head + 1)}
            for up_to in range(head + 1):
                following |= {window.received(EPOCH, up_to, resend, now) for resend in (False, True)}
        for window in following:
            assert 0 <= window.acked <= window.cursor <= head
            assert len(window.flights) <= MAX_IN_FLIGHT
            assert all(window.acked < flight.last <= window.cursor for flight in window.flights)
            # Never stuck: something is to be sent, or everything is acknowledged, or a deadline will come.
            if window.online and window.acked < head:
                assert window.next_after(head) is not None or window.deadline is not None
            if not window.online:
                assert window.next_after(head) is None
        states = following - seen
        seen |= states
    assert len(seen) > 2_000
