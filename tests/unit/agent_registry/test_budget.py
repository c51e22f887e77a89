from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from garrison_agent.registry.budget import Evict, Fits, InstalledBlob, Refuse, plan_space


def _installed(name: str, digests: dict[str, int], last_used: int, *, protected: bool = False) -> InstalledBlob:
    return InstalledBlob(name, digests, last_used, protected)


def test_fits_only_with_the_reserve() -> None:
    assert plan_space(60, 100, 40, []) == Fits()
    assert plan_space(61, 100, 40, []) == Refuse(1)


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    old, middle, new = (_installed(name, {name: 50}, at) for at, name in enumerate(("old", "middle", "new")))
    assert plan_space(90, 0, 0, [new, old, middle]) == Evict((old, middle), ("middle", "old"), 100)


def test_an_old_one_stays_when_a_later_one_suffices() -> None:
    small, big = _installed("small", {"s": 10}, 1), _installed("big", {"b": 100}, 2)
    assert plan_space(90, 0, 0, [small, big]) == Evict((big,), ("b",), 100)


def test_protected_packages_stay() -> None:
    serving = _installed("serving", {"s": 100}, 1, protected=True)
    assert plan_space(90, 0, 0, [serving]) == Refuse(90)


def test_a_shared_blob_frees_nothing_while_another_package_holds_it() -> None:
    serving = _installed("serving", {"shared": 100, "own": 1}, 9, protected=True)
    old = _installed("old", {"shared": 100, "its": 5}, 1)
    assert plan_space(5, 0, 0, [serving, old]) == Evict((old,), ("its",), 5)
    assert plan_space(50, 0, 0, [serving, old]) == Refuse(45)


def test_a_blob_shared_by_two_that_go_counts_once() -> None:
    pair = [_installed(name, {"shared": 100}, at) for at, name in enumerate("ab")]
    assert plan_space(100, 0, 0, pair) == Evict(tuple(pair), ("shared",), 100)


PACKAGES = st.lists(
    st.builds(
        lambda digests, last_used, protected: InstalledBlob(
            "p", {digest: int(digest, 36) * 10 for digest in digests}, last_used, protected
        ),
        st.sets(st.sampled_from("123456789"), max_size=4),
        st.integers(0, 5),
        st.booleans(),
    ),
    max_size=6,
)


@given(st.integers(0, 500), st.integers(0, 300), st.integers(0, 100), PACKAGES)
def test_any_plan_makes_room_and_takes_nothing_protected(
    needed: int, free: int, reserve: int, installed: list[InstalledBlob]
) -> None:
    plan = plan_space(needed, free, reserve, installed)
    if isinstance(plan, Evict):
        assert free + plan.freed_bytes >= needed + reserve
        assert not any(package.protected for package in plan.packages)
        kept = {
            digest
            for package in installed
            if not any(package is gone for gone in plan.packages)
            for digest in package.digests
        }
        assert kept.isdisjoint(plan.digests)
    elif isinstance(plan, Refuse):
        assert plan.missing_bytes > 0
    else:
        assert free >= needed + reserve
