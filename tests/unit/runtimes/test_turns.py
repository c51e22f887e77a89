from __future__ import annotations

from garrison_agent.runtimes.llama.turns import Turns, makes_way


def filled(*pairs: str) -> Turns[str]:
    turns: Turns[str] = Turns()
    for pair in pairs:
        turns.add(pair[0], pair)
    return turns


def drained(turns: Turns[str]) -> list[str]:
    return [turns.pop() for _ in range(len(turns))]


def test_lines_are_served_in_turn_and_each_in_order() -> None:
    assert drained(filled("a1", "a2", "a3", "b1", "c1", "c2")) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_who_was_just_served_waits_for_the_others_also_when_coming_again() -> None:
    turns = filled("a1", "b1", "b2")
    assert turns.pop() == "a1"
    turns.add("a", "a2")
    assert drained(turns) == ["b1", "a2", "b2"]


def test_what_is_removed_is_returned_and_empty_lines_are_gone() -> None:
    turns = filled("a1", "b1", "b2", "c1")
    assert sorted(turns.remove(lambda item: item in ("a1", "b2"))) == ["a1", "b2"]
    assert turns.remove(lambda item: item == "a1") == []
    assert (len(turns), turns.line("a"), turns.line("b")) == (2, 0, 1)
    assert drained(turns) == ["b1", "c1"]


def test_whose_turn_was_cut_short_is_first_in_its_line_and_another_line_may_be_preferred() -> None:
    turns = filled("a1", "b1", "c1")
    turns.add_first("b", "b0")
    turns.add_first("d", "d0")
    turns.prefer("c")
    assert list(turns.keys) == ["c", "a", "b", "d"]
    assert drained(turns) == ["c1", "a1", "b0", "d0", "b1"]


def test_places_are_given_up_for_those_with_fewer() -> None:
    assert [makes_way(holds, 0) for holds in range(4)] == [False, True, True, True]
    assert [makes_way(holds, 1) for holds in range(5)] == [False, False, False, True, True]
    assert not makes_way(2, 2)
