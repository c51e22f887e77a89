"""Whether requests to a tensor model may share a run: tried at load, with made-up inputs.

They may where the model answers rows together as it answers each alone, and takes less time for it. Symbolic names of
dimensions promise neither: exporters name an input's and an output's rows as they like.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np

from garrison_agent.runtimes.tensors.runs import Arrays, Model, Sharing
from garrison_agent.runtimes.tensors.tensor import TYPES, Array, TensorSpec
from garrison_protocol.errors import GarrisonError

MEASURE_S = 0.5
"""What trying may add to a load, about."""
PROBE_S = 2.0
"""A made-up run that takes longer is stopped: the model may even loop for ever."""
_SIZES = (2, 4, 8, 16, 32)
_WORTH = 0.9
"""Rows together must take at most this share of their time alone."""
_REPEATS = 3
_MADE_UP_SIZE = 8
"""Of a made-up input's other dimensions, where they may have any size."""
_TOLERANCE = {"FP16": 1e-2, "FP32": 1e-3, "FP64": 1e-6}
"""Relative: another number of rows may take another order of additions."""

_INTEGERS = (128, 2)
"""Made-up integers are below the first, or, where the model does not take those, below the next."""

Clock = Callable[[], float]


class _Probe:
    """Runs a model on made-up inputs, for a bounded time."""

    def __init__(self, model: Model, clock: Clock) -> None:
        self._model = model
        self._clock = clock
        self._outputs = tuple(spec.name for spec in model.outputs)

    def run(self, inputs: Arrays) -> tuple[dict[str, Array], float]:
        """Return the outputs and how long they took (seconds).

        Raises:
            GarrisonError: The model failed on these inputs, or was stopped.
        """
        run = self._model.new_run()
        alarm = threading.Timer(PROBE_S, run.stop)
        alarm.start()
        try:
            began = self._clock()
            return run.run(inputs, self._outputs), self._clock() - began
        finally:
            alarm.cancel()


def measure(model: Model, clock: Clock = time.perf_counter) -> Sharing:
    """Return how many rows of ``model``'s requests should share a run."""
    obstacle = _obstacle(model)
    if obstacle:
        return Sharing(1, obstacle)
    probe = _Probe(model, clock)
    try:
        rows, alone = _try_rows(probe, model.inputs)
        together, _ = probe.run(_joined(rows))
        different = _difference(model.outputs, alone, together)
        if different:
            return Sharing(1, different)
        return _fastest(probe, rows[0], clock)
    except GarrisonError as error:
        return Sharing(1, f"the model was not tried: on made-up inputs it says {error.message}")


def _obstacle(model: Model) -> str:
    for what, specs in (("input", model.inputs), ("output", model.outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != -1:
                return f"{what} {spec.name} has no first dimension of any size"
            if spec.datatype == "BYTES":
                return f"{what} {spec.name} holds strings, of which none can be made up"
    return "" if model.inputs and model.outputs else "the model has no inputs or no outputs"


def _try_rows(probe: _Probe, inputs: list[TensorSpec]) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """Return two made-up rows that the model takes, and its outputs for each alone."""
    for end in _INTEGERS[:-1]:
        rows = [_made_up(inputs, seed, end) for seed in (1, 2)]
        with contextlib.suppress(GarrisonError):
            return rows, [probe.run(row)[0] for row in rows]
    rows = [_made_up(inputs, seed, _INTEGERS[-1]) for seed in (1, 2)]
    return rows, [probe.run(row)[0] for row in rows]


def _made_up(inputs: list[TensorSpec], seed: int, end: int) -> dict[str, Array]:
    """Return one row; its integers are below ``end``."""
    chance = np.random.default_rng(seed)
    row = {}
    for spec in inputs:
        shape = [1, *(_MADE_UP_SIZE if size == -1 else size for size in spec.shape[1:])]
        floating = spec.datatype in _TOLERANCE
        values = chance.random(shape) if floating else chance.integers(0, end, shape)
        row[spec.name] = values.astype(TYPES[spec.datatype])
    return row


def _joined(rows: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _difference(specs: list[TensorSpec], alone: list[dict[str, Array]], together: dict[str, Array]) -> str:
    for spec in specs:
        expected, got = np.concatenate([answer[spec.name] for answer in alone]), together[spec.name]
        if expected.shape != got.shape:
            return f"output {spec.name} of two rows is not the two rows' own"
        tolerance = _TOLERANCE.get(spec.datatype)
        if tolerance is None:
            same = np.array_equal(expected, got)
        else:
            same = np.allclose(expected, got, rtol=tolerance, atol=tolerance / 100, equal_nan=True)
        if not same:
            return f"a row's output {spec.name} depends on the row beside it"
    return ""


def _fastest(probe: _Probe, row: dict[str, Array], clock: Clock) -> Sharing:
    """Return the number of rows whose run takes least for each, if that is worth it."""
    began = clock()
    single_s = min(probe.run(row)[1] for _ in range(_REPEATS))
    took_s: dict[int, float] = {}
    for size in _SIZES:
        if clock() - began + _REPEATS * size * single_s > MEASURE_S:
            break
        several = _joined([row] * size)
        took_s[size] = min(probe.run(several)[1] for _ in range(_REPEATS)) / size
        single_s = min(single_s, probe.run(row)[1])  # beside the others, since a board's speed changes
    if not took_s:
        return Sharing(1, f"a run takes {single_s * 1000:.0f} ms, too long to measure at load")
    best = min(took_s, key=took_s.__getitem__)
    share = took_s[best] / single_s
    if share > _WORTH:
        return Sharing(1, f"no gain: of {best} rows in a run, each takes {share:.2f} of its time alone")
    return Sharing(best, f"of {best} rows in a run, each takes {share:.2f} of its time alone")
