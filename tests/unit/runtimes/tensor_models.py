"""Tensor models in a few lines of numpy, whose runs a test can hold up, count, and make fail."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from garrison_agent.runtimes.tensors.runs import Arrays
from garrison_agent.runtimes.tensors.tensor import Array, TensorSpec
from garrison_protocol.errors import UnavailableError

DEADLINE_S = 20.0
Function = Callable[[Array], Array]


class NumpyModel:
    """``y = function(x)`` over rows of two numbers. ``seen`` holds the rows of each run."""

    def __init__(self, function: Function, *, cost: Callable[[int], None] = lambda rows: None) -> None:
        self.inputs = [TensorSpec("x", "FP32", (-1, 2))]
        self.outputs = [TensorSpec("y", "FP32", (-1, 2))]
        self.function = function
        self.cost = cost
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.seen: list[list[list[float]]] = []

    def new_run(self) -> NumpyRun:
        return NumpyRun(self)


class NumpyRun:
    """One run. A row that holds 666 fails."""

    def __init__(self, model: NumpyModel) -> None:
        self._model = model
        self._stopped = threading.Event()

    def run(self, inputs: Arrays, outputs: tuple[str, ...]) -> dict[str, Array]:
        model, rows = self._model, inputs["x"]
        model.seen.append(rows.tolist())
        model.entered.release()
        while not model.gate.wait(0.005):
            if self._stopped.is_set():
                raise UnavailableError("oip.infer_failed", "stopped")
        if (rows == 666).any():
            raise UnavailableError("oip.infer_failed", "666")
        model.cost(len(rows))
        return {name: model.function(rows) for name in outputs}

    def stop(self) -> None:
        self._stopped.set()


def row(*values: float) -> dict[str, Array]:
    """Return an input of one row for every two values."""
    return {"x": np.array(values, np.float32).reshape(-1, 2)}
