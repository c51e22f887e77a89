from __future__ import annotations

import pytest

from garrison_agent.runtimes.llama.prefix_store import PrefixStore, shared

COST = 8


def tokens(text: str) -> list[int]:
    return list(text.encode())


def test_the_longest_beginning_is_found() -> None:
    store = PrefixStore(1000)
    store.keep(tokens("abcx"), b"1")
    store.keep(tokens("abcdx"), b"2")
    saved, count = store.find(tokens("abcdef"), 6)
    assert saved is not None
    assert (saved.state, count) == (b"2", 4)
    assert store.find(tokens("xyz"), 3) == (None, 0)
    assert store.find(tokens("abcdef"), 2)[1] == 2


def test_only_whole_ones_are_found_where_they_cannot_be_cut() -> None:
    store = PrefixStore(1000)
    store.keep(tokens("abcx"), b"1")
    store.keep(tokens("ab"), b"2")
    saved, count = store.find(tokens("abcdef"), 6, whole=True)
    assert saved is not None
    assert (saved.state, count) == (b"2", 2)


def test_the_bound_holds_and_the_oldest_goes_first() -> None:
    store = PrefixStore(3 * (10 + 2 * COST))
    for name in ("aa", "bb", "cc", "dd"):
        store.keep(tokens(name), b"0123456789")
    assert store.size_bytes <= store.limit_bytes
    assert [store.find(tokens(name), 2)[1] for name in ("aa", "bb", "cc", "dd")] == [0, 2, 2, 2]


def test_one_that_is_larger_than_the_bound_is_not_kept_and_leaves_nothing() -> None:
    store = PrefixStore(20)
    store.keep(tokens("a"), b"x" * 100)
    assert (store.find(tokens("a"), 1), store.size_bytes) == ((None, 0), 0)


def test_a_longer_one_replaces_its_own_beginnings() -> None:
    store = PrefixStore(1000)
    store.keep(tokens("ab"), b"1")
    store.keep(tokens("xy"), b"2")
    store.keep(tokens("abc"), b"3")
    assert store.size_bytes == 2 + 5 * COST
    assert store.find(tokens("ab"), 2)[1] == 2


def test_a_copy_that_had_to_leave_meanwhile_may_be_given_up_again() -> None:
    store = PrefixStore(30)
    store.keep(tokens("ab"), b"1")
    saved, _ = store.find(tokens("ab"), 2)
    assert saved is not None
    store.keep(tokens("xy"), b"2")
    store.drop(saved)
    assert store.size_bytes == 1 + 2 * COST
    assert store.find(tokens("xy"), 2)[1] == 2


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 600])
def test_lists_are_compared_up_to_the_first_difference(length: int) -> None:
    left, right = [7] * length + [1, 2], [7] * length + [3, 4, 5]
    assert shared(left, right, 1000) == length
    assert shared(left, left, 1000) == length + 2
    assert shared(left, right, length // 2) == length // 2
    assert shared(left, right, -1) == 0
