"""When does a case of the gate pass? Pure; numbers and text in, verdict out."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from garrison_protocol.manifest import ChoiceCase, LabelCase, SimilarityCase


def choice_passes(case: ChoiceCase, log_probabilities: Sequence[float | None]) -> bool:
    """Tell whether the expected choice is strictly the likeliest.

    None or NaN anywhere fails the case: a model that yields no probabilities is damaged, not undecided.
    """
    if len(log_probabilities) != len(case.choices):
        return False
    values = [value for value in log_probabilities if value is not None and math.isfinite(value)]
    if len(values) != len(case.choices):
        return False
    expected = values[case.expected]
    return all(value < expected for index, value in enumerate(values) if index != case.expected)


def label_passes(case: LabelCase, scores: Sequence[float | str | None]) -> bool:
    """Tell whether the expected index has strictly the highest score, and enough of it."""
    values = [score for score in scores if isinstance(score, int | float) and math.isfinite(score)]
    if len(values) != len(scores) or case.expected_index >= len(values):
        return False  # an output of strings has no highest score
    expected = values[case.expected_index]
    others = (score for index, score in enumerate(values) if index != case.expected_index)
    return expected >= case.min_score and all(score < expected for score in others)


def similarity_passes(case: SimilarityCase, vectors: Sequence[Sequence[float]]) -> bool:
    """Tell whether the anchor is more similar to the closer text than to the farther one, by more than the margin.

    ``vectors``: those of anchor, closer, and farther. Vectors of different lengths, without a direction, or with
    what is no number fail the case.
    """
    if len(vectors) != 3 or len({len(vector) for vector in vectors}) != 1:
        return False
    closer, farther = _cosine(vectors[0], vectors[1]), _cosine(vectors[0], vectors[2])
    return math.isfinite(closer) and math.isfinite(farther) and closer > farther + case.margin


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(map(operator.mul, one, other)) / lengths if lengths else math.nan


def accuracy(passed: int, cases: int) -> float:
    """Return the share of passed cases."""
    return passed / cases if cases else 0.0
