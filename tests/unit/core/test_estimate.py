from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_agent.core.estimate import MIB, Measured, estimate_mb, learn, limit_mb

ONE = Measured(peak_mb=350, tokens=8192, kv_bytes_per_token=23_040, load_ms=500, used=True)
MEASURED = st.builds(
    Measured,
    peak_mb=st.integers(1, 10_000),
    tokens=st.sampled_from([2048, 8192]),
    kv_bytes_per_token=st.sampled_from([0, 23_040]),
    load_ms=st.integers(0, 10_000),
    used=st.booleans(),
)


def test_before_the_first_load_the_manifest_says_but_never_less_than_the_files() -> None:
    assert estimate_mb(400, 100 * MIB, 8192, None) == 400
    assert estimate_mb(0, 100 * MIB + 1, 8192, None) == 101


def test_what_was_measured_replaces_the_guess_once_requests_were_answered() -> None:
    assert estimate_mb(900, 100 * MIB, 8192, ONE) == 350
    assert estimate_mb(200, 100 * MIB, 8192, ONE) == 350
    assert estimate_mb(900, 100 * MIB, 8192, replace(ONE, used=False)) == 900


@pytest.mark.parametrize(("tokens", "size"), [(8192, 350), (16_384, 530), (2048, 215)])
def test_another_context_costs_its_exact_keys_and_values(tokens: int, size: int) -> None:
    assert estimate_mb(900, 100 * MIB, tokens, ONE) == size


def test_a_longer_context_of_unknown_size_is_not_taken_for_the_shorter_one() -> None:
    unknown = replace(ONE, kv_bytes_per_token=0)
    assert estimate_mb(900, 0, 16_384, unknown) == 900
    assert estimate_mb(900, 0, 8192, unknown) == 350


@given(MEASURED, MEASURED)
def test_a_peak_of_the_same_context_is_never_forgotten(before: Measured, now: Measured) -> None:
    known = learn(before, now)
    assert known.tokens == now.tokens
    assert known.peak_mb >= now.peak_mb
    if before.tokens == now.tokens:
        assert known.peak_mb == max(before.peak_mb, now.peak_mb)
        assert known.used is (before.used or now.used)
    assert learn(known, now) == known


def test_the_limit_is_the_budget_until_something_was_measured() -> None:
    assert limit_mb(400, 3000, None) == 3000
    assert limit_mb(400, 3000, replace(ONE, used=False)) == 3000
    assert limit_mb(2000, 3000, ONE) == 3000
    assert limit_mb(300, 3000, ONE) == 556
    assert limit_mb(4000, 3000, None) == 4000
