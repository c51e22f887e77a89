from __future__ import annotations

from garrison_agent.runtimes.patterns import MAX_MATCHED_CHARS, pattern_matches


def test_a_pattern_is_searched_in_the_beginning_of_the_answer_only() -> None:
    assert pattern_matches("(?i)paris", "It is Paris.")
    assert not pattern_matches("Paris", "It is Rome.")
    assert not pattern_matches("Paris", " " * MAX_MATCHED_CHARS + "Paris")


def test_half_a_surrogate_pair_in_an_answer_is_matched_like_any_other_character() -> None:
    assert pattern_matches("^.$", "\ud800")


def test_an_invalid_pattern_fails() -> None:
    assert not pattern_matches("(", "(")


def test_a_pattern_that_would_backtrack_for_ever_fails_in_time() -> None:
    assert not pattern_matches("^(a+)+$", "a" * 60 + "!", timeout_s=0.5)
