"""Runs of a tensor model, one at a time, in a thread of their own; requests that wait may share the next one.

Nobody waits for company: a request that finds the model idle runs at once. Which models share runs: tensor_sharing.py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from garrison_agent.runtimes.tensors.tensor import Array, TensorSpec
from garrison_protocol.errors import UnavailableError

MAX_WAITING = 256

Arrays = Mapping[str, Array]


class Run(Protocol):
    """One run of a model."""

    def run(self, inputs: Arrays, outputs: tuple[str, ...]) -> dict[str, Array]:
        """Return the outputs asked for, by name; raises GarrisonError."""

    def stop(self) -> None:
        """End the run early; callable from any thread."""


class Model(Protocol):
    """What is run; ``onnx_session.Session`` is one."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def new_run(self) -> Run:
        """Return a run that has not begun."""


@dataclass(frozen=True)
class Sharing:
    """How many rows may share a run (1: every request runs alone), and why."""

    rows: int
    why: str

    def to_dict(self) -> dict[str, object]:
        """Return the form in a worker's facts."""
        return {"on": self.rows > 1, "rows": self.rows, "why": self.why}


@dataclass(eq=False)
class Job:
    """A request's run. ``rows``: its share of a first dimension that may have any size; 0: it runs alone."""

    inputs: Arrays
    outputs: tuple[str, ...]
    app: str
    rows: int
    kind: object
    """Jobs of one kind differ in their rows only."""
    answer: Future[dict[str, Array]] = field(default_factory=Future)
    given_up: bool = False


class Runner:
    """Runs jobs in one thread, in turn over the applications that they come from. ``sharing`` may be replaced."""

    def __init__(self, model: Model, sharing: Sharing) -> None:
        self._model = model
        self.sharing = sharing
        self._waiting: dict[str, deque[Job]] = {}
        self._count = 0
        self._running: tuple[list[Job], Run] | None = None
        self._news = threading.Condition()
        self.runs = 0
        """How many runs there were: fewer than requests where some shared one."""
        threading.Thread(target=self._work, daemon=True, name="infer").start()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._count

    @property
    def active(self) -> int:
        """How many requests the run under way is for."""
        running = self._running
        return 0 if running is None else len(running[0])

    def submit(self, inputs: Arrays, outputs: tuple[str, ...], app: str = "") -> Job:
        """Return a job whose ``answer`` will come.

        Raises:
            UnavailableError: ``inference.queue_full``.
        """
        job = Job(inputs, outputs, app, *self._share(inputs, outputs))
        with self._news:
            if self._count >= MAX_WAITING:
                raise UnavailableError(
                    "inference.queue_full",
                    f"{self._count} requests wait for this model already",
                    hint="retry in a moment",
                    retryable=True,
                )
            self._waiting.setdefault(app, deque()).append(job)
            self._count += 1
            self._news.notify()
        return job

    def give_up(self, job: Job) -> None:
        """Take note that nobody wants the answer of ``job`` any more; a run that nobody at all wants is stopped."""
        with self._news:
            job.given_up = True
            queue = self._waiting.get(job.app, ())
            if job in queue:
                self._waiting[job.app].remove(job)
                self._count -= 1
                self._tidy()
                job.answer.cancel()
            elif self._running is not None and all(one.given_up for one in self._running[0]):
                self._running[1].stop()

    def _share(self, inputs: Arrays, outputs: tuple[str, ...]) -> tuple[int, object]:
        rows = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
        if self.sharing.rows == 1 or len(rows) != 1:
            return 0, None
        shapes = tuple((name, array.shape[1:]) for name, array in sorted(inputs.items()))
        return rows.pop(), (outputs, shapes)

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._count)
                jobs, run = self._take(), self._model.new_run()
                self._running = jobs, run
            self._answer(jobs, run)
            with self._news:
                self._running = None

    def _take(self) -> list[Job]:
        """Return what runs next: the first of the application whose turn it is, and who can share its run."""
        app, queue = next(iter(self._waiting.items()))
        first = queue.popleft()
        self._waiting[app] = self._waiting.pop(app)  # behind the others
        jobs, rows = [first], first.rows
        for others in self._waiting.values() if first.rows else ():
            for job in list(others):
                if job.rows and job.kind == first.kind and rows + job.rows <= self.sharing.rows:
                    others.remove(job)
                    jobs.append(job)
                    rows += job.rows
        self._tidy()
        self._count -= len(jobs)
        for job in jobs:
            job.answer.set_running_or_notify_cancel()
        return jobs

    def _tidy(self) -> None:
        for app in [app for app, queue in self._waiting.items() if not queue]:
            del self._waiting[app]

    def _answer(self, jobs: list[Job], run: Run) -> None:
        self.runs += 1
        alone = len(jobs) == 1
        try:
            answers = [run.run(jobs[0].inputs, jobs[0].outputs)] if alone else self._run_together(jobs, run)
        except Exception as error:  # noqa: BLE001 - also a bug must not leave its caller waiting, nor end the thread
            if alone:
                jobs[0].answer.set_exception(error)
            else:
                self._answer_alone(jobs)
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)

    def _answer_alone(self, jobs: list[Job]) -> None:
        """Run each of a failed run by itself: only those that fail alone have failed."""
        for job in jobs:
            with self._news:
                run = self._model.new_run()
                self._running = [job], run
                if job.given_up:
                    run.stop()
            self._answer([job], run)

    def _run_together(self, jobs: list[Job], run: Run) -> list[dict[str, Array]]:
        first = jobs[0]
        inputs = {name: np.concatenate([job.inputs[name] for job in jobs]) for name in first.inputs}
        outputs = run.run(inputs, first.outputs)
        ends = np.cumsum([job.rows for job in jobs])
        if any(array.ndim == 0 or len(array) != ends[-1] for array in outputs.values()):
            self.sharing = Sharing(1, "a shared run gave outputs that are not one row for each of its inputs'")
            raise UnavailableError("oip.infer_failed", "the outputs of a shared run cannot be told apart")
        parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
        return [{name: pieces[place] for name, pieces in parts.items()} for place in range(len(jobs))]
