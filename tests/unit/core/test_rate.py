from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from garrison_agent.core.rate import Bucket


def test_a_minutes_allowance_may_be_used_at_once_and_refills_evenly() -> None:
    bucket = Bucket.full(60, 100.0)
    for _ in range(60):
        assert bucket.wait_s(1, 100.0) == 0
        bucket = bucket.take(1, 100.0)
    assert bucket.wait_s(1, 100.0) == 1.0
    assert bucket.wait_s(1, 100.5) == 0.5
    assert bucket.wait_s(1, 101.0) == 0
    assert bucket.full_s(101.0) == 59.0
    assert bucket.left(10_000.0) == 60  # never more than a minute's


def test_debts_are_paid_first() -> None:
    bucket = Bucket.full(600, 0.0).take(1000, 0.0)
    assert bucket.left(0.0) == -400
    assert bucket.wait_s(1, 0.0) == 40.1
    assert bucket.left(60.0) == 200


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = Bucket.full(60, 100.0).take(60, 100.0)
    assert bucket.left(100.0) == bucket.left(50.0) == 0


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=50),
)
def test_no_more_passes_than_the_rate_allows(per_minute: int, asks: list[tuple[float, int]]) -> None:
    bucket, now_s, passed = Bucket.full(per_minute, 0.0), 0.0, 0
    for pause_s, wanted in asks:
        now_s += pause_s
        amount = min(wanted, per_minute)
        if bucket.wait_s(amount, now_s) == 0:
            bucket = bucket.take(amount, now_s)
            passed += amount
    assert passed <= per_minute + now_s * per_minute / 60 + 1e-6
