from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import numpy as np
import pytest

from garrison_agent.runtimes.tensors.runs import MAX_WAITING, Job, Runner, Sharing
from garrison_agent.runtimes.tensors.tensor import Array
from garrison_protocol.errors import UnavailableError
from tests.unit.runtimes.tensor_models import DEADLINE_S, NumpyModel, row


def double(x: Array) -> Array:
    return x * 2


@pytest.fixture
def model() -> Iterator[NumpyModel]:
    made = NumpyModel(double)
    yield made
    made.gate.set()


def answer(job: Job) -> list[list[float]]:
    values: list[list[float]] = job.answer.result(DEADLINE_S)["y"].tolist()
    return values


def held_up(model: NumpyModel, runner: Runner) -> Job:
    """Return a job whose run has begun and does not end before the gate opens."""
    model.gate.clear()
    job = runner.submit(row(0, 0), ("y",))
    assert model.entered.acquire(timeout=DEADLINE_S)
    return job


def test_a_request_that_finds_the_model_idle_runs_at_once_and_alone(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))
    for number in range(3):
        assert answer(runner.submit(row(number, 1), ("y",))) == [[number * 2, 2]]
    assert [len(rows) for rows in model.seen] == [1, 1, 1]


def test_it_says_what_runs_and_what_waits(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))
    assert (runner.active, runner.waiting) == (0, 0)
    first = held_up(model, runner)
    second = runner.submit(row(1, 1), ("y",))
    assert (runner.active, runner.waiting) == (1, 1)
    model.gate.set()
    assert answer(first) == [[0, 0]]
    assert answer(second) == [[2, 2]]
    limit = time.monotonic() + DEADLINE_S
    while runner.active and time.monotonic() < limit:  # answers come before it looks for more to do
        time.sleep(0.001)  # between looks at a condition with a deadline
    assert runner.active == 0


def test_requests_that_wait_share_the_next_run_and_get_their_own_rows(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))
    first = held_up(model, runner)
    jobs = [runner.submit(row(number, 1), ("y",)) for number in range(3)]
    several = runner.submit(row(7, 7, 8, 8), ("y",))
    model.gate.set()
    assert [answer(job) for job in jobs] == [[[0, 2]], [[2, 2]], [[4, 2]]]
    assert answer(several) == [[14, 14], [16, 16]]
    assert answer(first) == [[0, 0]]
    assert [len(rows) for rows in model.seen] == [1, 5]
    assert runner.runs == 2


def test_a_run_has_at_most_so_many_rows_as_were_measured_to_help(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(2, ""))
    held_up(model, runner)
    jobs = [runner.submit(row(number, 1), ("y",)) for number in range(5)]
    large = runner.submit(row(1, 1, 2, 2, 3, 3), ("y",))
    model.gate.set()
    assert [answer(job) for job in jobs] == [[[number * 2, 2]] for number in range(5)]
    assert answer(large) == [[2, 2], [4, 4], [6, 6]]
    assert sorted(len(rows) for rows in model.seen[1:]) == [1, 2, 2, 3]


def test_where_sharing_is_off_each_runs_alone(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(1, "off"))
    held_up(model, runner)
    jobs = [runner.submit(row(number, 1), ("y",)) for number in range(3)]
    model.gate.set()
    assert [answer(job) for job in jobs] == [[[0, 2]], [[2, 2]], [[4, 2]]]
    assert [len(rows) for rows in model.seen] == [1, 1, 1, 1]


def test_other_shapes_and_other_outputs_do_not_share(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))
    held_up(model, runner)
    plain = runner.submit(row(1, 2), ("y",))
    wide = runner.submit({"x": np.ones((1, 3), np.float32)}, ("y",))
    other = runner.submit(row(1, 2), ("y", "z"))
    empty = runner.submit({"x": np.ones((0, 2), np.float32)}, ("y",))
    model.gate.set()
    assert answer(plain) == [[2, 4]]
    assert answer(wide) == [[2, 2, 2]]
    assert other.answer.result(DEADLINE_S)["z"].tolist() == [[2, 4]]
    assert answer(empty) == []
    assert [len(rows) for rows in model.seen] == [1, 1, 1, 1, 0]


def test_the_error_of_one_does_not_touch_those_beside_it(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))
    held_up(model, runner)
    good, bad, also = (runner.submit(row(value, 1), ("y",)) for value in (1, 666, 3))
    model.gate.set()
    assert answer(good) == [[2, 2]]
    assert answer(also) == [[6, 2]]
    with pytest.raises(UnavailableError, match="666"):
        bad.answer.result(DEADLINE_S)


def test_a_bug_reaches_its_caller_and_the_thread_goes_on(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))

    def broken(x: Array) -> Array:
        raise ZeroDivisionError

    model.function = broken
    job = runner.submit(row(1, 1), ("y",))
    with pytest.raises(ZeroDivisionError):
        job.answer.result(DEADLINE_S)
    model.function = double
    assert answer(runner.submit(row(1, 1), ("y",))) == [[2, 2]]


def test_outputs_that_cannot_be_told_apart_end_sharing_and_everybody_gets_their_own(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))
    held_up(model, runner)
    model.function = lambda x: x.max(axis=0, keepdims=True) if len(x) > 1 else x
    jobs = [runner.submit(row(number, 1), ("y",)) for number in range(3)]
    model.gate.set()
    assert [answer(job) for job in jobs] == [[[0, 1]], [[1, 1]], [[2, 1]]]
    assert runner.sharing.rows == 1


def test_applications_take_turns(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(1, ""))
    held_up(model, runner)
    greedy = [runner.submit(row(number, 0), ("y",), "greedy") for number in range(4)]
    modest = runner.submit(row(100, 0), ("y",), "modest")
    model.gate.set()
    for job in (*greedy, modest):
        answer(job)
    assert [rows[0][0] for rows in model.seen[1:]].index(100) == 1


def test_what_nobody_waits_for_any_more_does_not_run(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(1, ""))
    held_up(model, runner)
    left = runner.submit(row(1, 1), ("y",))
    stays = runner.submit(row(2, 2), ("y",))
    assert runner.waiting == 2
    runner.give_up(left)
    assert runner.waiting == 1
    model.gate.set()
    assert answer(stays) == [[4, 4]]
    assert len(model.seen) == 2
    with pytest.raises(CancelledError):
        left.answer.result(0)


def test_a_run_that_nobody_wants_is_stopped_and_the_next_one_runs(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(1, ""))
    job = held_up(model, runner)
    runner.give_up(job)
    with pytest.raises(UnavailableError, match="stopped"):
        job.answer.result(DEADLINE_S)
    model.gate.set()
    assert answer(runner.submit(row(1, 1), ("y",))) == [[2, 2]]


def test_a_shared_run_goes_on_as_long_as_one_wants_it(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(8, ""))
    first = held_up(model, runner)
    left, stays = (runner.submit(row(value, 0), ("y",)) for value in (1, 2))
    runner.give_up(first)
    assert model.entered.acquire(timeout=DEADLINE_S)  # the run of the two has begun
    runner.give_up(left)
    model.gate.set()
    assert answer(stays) == [[4, 0]]
    assert len(model.seen) == 2


def test_the_queue_has_an_end(model: NumpyModel) -> None:
    runner = Runner(model, Sharing(1, ""))
    held_up(model, runner)
    jobs = [runner.submit(row(1, 1), ("y",)) for _ in range(MAX_WAITING)]
    with pytest.raises(UnavailableError) as refused:
        runner.submit(row(1, 1), ("y",))
    assert (refused.value.code, refused.value.retryable) == ("inference.queue_full", True)
    runner.give_up(jobs[0])
    runner.submit(row(1, 1), ("y",))
