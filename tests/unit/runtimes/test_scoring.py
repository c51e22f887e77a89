from __future__ import annotations

import math
from typing import Any

import pytest

from garrison_agent.runtimes.scoring import choice_passes, label_passes, similarity_passes
from garrison_protocol.manifest import ChoiceCase, LabelCase, SimilarityCase, Tensor

CHOICE = ChoiceCase(id="c", prompt="p", choices=("a", "b", "c"), expected=1)
LABEL = LabelCase(
    id="l",
    inputs=(Tensor(name="x", datatype="FP32", shape=(1,), data=(1.0,)),),
    output="y",
    expected_index=1,
    min_score=0.5,
)


@pytest.mark.parametrize(
    ("scores", "passes"),
    [
        ([-2.0, -1.0, -3.0], True),
        ([-1.0, -2.0, -3.0], False),
        ([-1.0, -1.0, -3.0], False),
        ([-2.0, -1.0, math.nan], False),
        ([math.nan, math.nan, math.nan], False),
        ([-2.0, -1.0, None], False),
        ([-2.0, -1.0, -math.inf], False),
        ([-2.0, -1.0], False),
    ],
)
def test_a_choice_passes_only_as_the_strict_and_finite_best(scores: list[float | None], passes: bool) -> None:
    assert choice_passes(CHOICE, scores) is passes


@pytest.mark.parametrize(
    ("scores", "passes"),
    [
        ([0.1, 0.9], True),
        ([0.5, 0.5], False),
        ([0.2, 0.4], False),
        ([0.9, 0.1], False),
        ([0.1], False),
        ([math.nan, 0.9], False),
    ],
)
def test_a_label_passes_only_as_the_strict_best_with_enough_score(scores: list[float], passes: bool) -> None:
    assert label_passes(LABEL, scores) is passes


def test_an_output_without_numbers_fails() -> None:
    for scores in (["cat", "dog"], [None, 0.9]):
        seen: list[Any] = scores
        assert label_passes(LABEL, seen) is False


@pytest.mark.parametrize(
    ("vectors", "margin", "passes"),
    [
        ([[1, 0], [2, 1], [0, 3]], 0.0, True),
        ([[1, 0], [0, 3], [2, 1]], 0.0, False),
        ([[1, 0], [1, 1], [2, 2]], 0.0, False),
        ([[1, 0], [1, 1], [0, 1]], 0.7, True),
        ([[1, 0], [1, 1], [0, 1]], 0.71, False),
        ([[1, 0], [1, 1], [0, 0]], 0.0, False),
        ([[0, 0], [1, 1], [1, 0]], 0.0, False),
        ([[1, 0], [1, math.nan], [0, 1]], 0.0, False),
        ([[1, 0], [math.inf, 1], [0, 1]], 0.0, False),
        ([[1, 0], [1, 1], [1]], 0.0, False),
        ([[1, 0], [1, 1]], 0.0, False),
    ],
)
def test_the_closer_text_must_be_more_similar(vectors: list[list[float]], margin: float, passes: bool) -> None:
    case = SimilarityCase(id="s", anchor="a", closer="b", farther="c", margin=margin)
    assert similarity_passes(case, vectors) is passes
