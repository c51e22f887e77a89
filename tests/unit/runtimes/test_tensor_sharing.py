from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from garrison_agent.runtimes.tensors.sharing import measure
from garrison_agent.runtimes.tensors.tensor import Array, TensorSpec
from garrison_protocol.errors import UnavailableError
from tests.unit.runtimes.tensor_models import NumpyModel


class Clock:
    """Time that only runs cost: ``seconds(rows)`` each."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pay(self, rows: int) -> None:
        self.now_s += self._seconds(rows)


def try_model(function: Callable[[Array], Array], seconds: Callable[[int], float]) -> tuple[int, str, NumpyModel]:
    clock = Clock(seconds)
    model = NumpyModel(function, cost=clock.pay)
    sharing = measure(model, clock)
    return sharing.rows, sharing.why, model


def double(x: Array) -> Array:
    return x * 2


def cheap_together(rows: int) -> float:
    return 0.001 + 0.0001 * rows


def test_rows_share_where_that_takes_less_for_each() -> None:
    rows, why, _ = try_model(double, cheap_together)
    assert (rows, why) == (32, "of 32 rows in a run, each takes 0.12 of its time alone")


def test_the_best_number_is_taken_not_the_largest() -> None:
    rows, _, _ = try_model(double, lambda rows: 0.001 * rows * (0.5 if rows == 4 else 0.95))
    assert rows == 4


@pytest.mark.parametrize("seconds", [lambda rows: 0.001 * rows, lambda rows: 0.001 * rows * (0.93 if rows > 1 else 1)])
def test_rows_do_not_share_for_nothing(seconds: Callable[[int], float]) -> None:
    rows, why, _ = try_model(double, seconds)
    assert rows == 1
    assert why.startswith("no gain")


def test_trying_takes_about_half_a_second_at_most() -> None:
    for single_s in (0.00001, 0.001, 0.02, 0.1, 0.3):
        clock = Clock(lambda rows, one=single_s: one * rows)  # type: ignore[misc] # a default binds the loop's value
        measure(NumpyModel(double, cost=clock.pay), clock)
        assert clock.now_s <= 0.5 + 10 * single_s
    assert "too long to measure" in try_model(double, lambda rows: 0.3 * rows)[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(axis=0),
        lambda x: x / (1e-6 + x.sum(axis=0)),
        lambda x: x[::-1],
        lambda x: x + len(x),
    ],
    ids=["mean", "share", "order", "count"],
)
def test_rows_that_touch_each_other_never_share(function: Callable[[Array], Array]) -> None:
    rows, why, _ = try_model(function, cheap_together)
    assert (rows, why) == (1, "a row's output y depends on the row beside it")


def test_an_output_without_a_row_for_each_never_shares() -> None:
    rows, why, _ = try_model(lambda x: x[:1], cheap_together)
    assert (rows, why) == (1, "output y of two rows is not the two rows' own")


def test_not_a_number_is_the_same_as_not_a_number() -> None:
    assert try_model(lambda x: np.full_like(x, np.nan), cheap_together)[0] == 32


def test_a_model_that_does_not_take_what_is_made_up_never_shares() -> None:
    model = NumpyModel(double)
    model.inputs = [TensorSpec("x", "INT64", (-1, 2))]

    def refuse(rows: int) -> None:
        raise UnavailableError("oip.infer_failed", "index out of range")

    model.cost = refuse
    sharing = measure(model)
    assert (sharing.rows, "index out of range" in sharing.why) == (1, True)


def test_small_vocabularies_are_tried_with_small_integers() -> None:
    model = NumpyModel(double)
    model.inputs = [TensorSpec("x", "INT64", (-1, 2))]
    model.outputs = [TensorSpec("y", "INT64", (-1, 2))]
    clock = Clock(cheap_together)

    def lookup(x: Array) -> Array:
        if (x > 1).any():
            raise UnavailableError("oip.infer_failed", "index out of range")
        return x

    model.function, model.cost = lookup, clock.pay
    assert measure(model, clock).rows == 32


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        (TensorSpec("x", "FP32", (1, 2)), TensorSpec("y", "FP32", (-1, 2)), "input x has no first dimension"),
        (TensorSpec("x", "FP32", ()), TensorSpec("y", "FP32", (-1, 2)), "input x has no first dimension"),
        (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("y", "FP32", (2,)), "output y has no first dimension"),
        (TensorSpec("x", "BYTES", (-1, 2)), TensorSpec("y", "FP32", (-1, 2)), "input x holds strings"),
    ],
)
def test_models_without_rows_are_not_tried(inputs: TensorSpec, outputs: TensorSpec, why: str) -> None:
    model = NumpyModel(double)
    model.inputs, model.outputs = [inputs], [outputs]
    sharing = measure(model)
    assert sharing.rows == 1
    assert sharing.why.startswith(why)
    assert model.seen == []
