"""Which inputs share a batch, who waits for whom, and every reason for which a request gets no vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from garrison_agent.runtimes.embeddings.batching import (
    MAX_WAITING,
    Embedding,
    EmbeddingBatcher,
    EmbeddingError,
    Input,
    Vector,
    normalised,
)
from garrison_protocol.errors import GarrisonError, UnavailableError


class LetterBackend:
    """A model whose tokens are letters and whose vector is their sum and count."""

    context_length = 8
    batch_size = 10
    parallel = 3
    vocabulary = 200

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.fails = False
        self.meanwhile: Callable[[], None] = lambda: None

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def cut(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens[: self.context_length])

    def embed(self, inputs: Sequence[Sequence[int]], go_on: Callable[[], bool]) -> list[Vector] | None:
        if self.fails:
            raise EmbeddingError("no")
        self.meanwhile()
        if not go_on():
            return None
        self.batches.append([list(one) for one in inputs])
        return [np.array([sum(one), len(one)], np.float32) for one in inputs]


class Desk:
    """A batcher and what its requests were answered with."""

    def __init__(self) -> None:
        self.backend = LetterBackend()
        self.now = 0.0
        self.batcher = EmbeddingBatcher(self.backend, clock=lambda: self.now)
        self.answers: dict[str, list[Vector] | GarrisonError] = {}

    def ask(self, name: str, *inputs: Input, truncate: bool = False, deadline_s: float | None = None) -> Embedding:
        request = Embedding(
            inputs, lambda value: self.answers.update({name: value}), truncate=truncate, deadline_s=deadline_s
        )
        self.batcher.add(request)
        return request

    def run(self) -> None:
        while self.batcher.busy:
            self.batcher.step()

    def code(self, name: str) -> str:
        answer = self.answers[name]
        assert isinstance(answer, GarrisonError)
        return answer.code


@pytest.fixture
def desk() -> Desk:
    return Desk()


def sums(answer: list[Vector] | GarrisonError) -> list[int]:
    assert isinstance(answer, list)
    return [int(vector[0]) for vector in answer]


def test_vectors_come_in_the_order_of_the_inputs(desk: Desk) -> None:
    request = desk.ask("a", "a", "bb", "ccc", "dddd", (1, 2))
    desk.run()
    assert sums(desk.answers["a"]) == [97, 196, 297, 400, 3]
    assert request.prompt_tokens == 12


def test_a_batch_holds_whole_inputs_up_to_its_bounds(desk: Desk) -> None:
    desk.ask("a", "aaaa", "bbbb", "cccc", "d", "e", "f", "g")
    desk.run()
    assert [[len(one) for one in batch] for batch in desk.backend.batches] == [[4, 4], [4, 1, 1], [1, 1]]


def test_a_short_request_does_not_wait_for_a_long_one(desk: Desk) -> None:
    desk.ask("long", *(["xxxx"] * 20))
    desk.batcher.step()
    desk.ask("short", "a")
    desk.batcher.step()
    assert "short" in desk.answers
    assert "long" not in desk.answers
    desk.run()
    assert sums(desk.answers["long"]) == [480] * 20


def test_a_cancelled_request_ends_before_its_next_batch(desk: Desk) -> None:
    request = desk.ask("a", *(["xxxx"] * 20))
    desk.batcher.step()
    request.cancelled = True
    desk.batcher.step()
    assert len(desk.backend.batches) == 1
    assert not desk.batcher.busy
    assert desk.code("a") == "inference.client_disconnected"


def test_a_batch_that_nobody_waits_for_is_given_up(desk: Desk) -> None:
    gone, other = desk.ask("a", "xxxx"), desk.ask("b", "yyyy")
    desk.backend.meanwhile = lambda: setattr(gone, "cancelled", True)
    desk.batcher.step()
    assert sums(desk.answers["b"]) == [484], "somebody waits for this half of it"
    gone = desk.ask("c", "xxxx")
    desk.run()
    assert desk.code("c") == "inference.client_disconnected"
    assert len(desk.backend.batches) == 1
    assert not other.cancelled


def test_an_input_longer_than_a_shared_batch_goes_alone(desk: Desk) -> None:
    desk.backend.context_length = 15
    desk.ask("a", "x", "y" * 15, "z")
    desk.run()
    assert [[len(one) for one in batch] for batch in desk.backend.batches] == [[1], [15], [1]]


def test_a_late_request_ends(desk: Desk) -> None:
    desk.ask("a", *(["xxxx"] * 20), deadline_s=5.0)
    desk.batcher.step()
    desk.now = 5.0
    desk.run()
    assert desk.code("a") == "inference.deadline_exceeded"
    assert len(desk.backend.batches) == 1


def test_an_input_beyond_the_context_is_named(desk: Desk) -> None:
    desk.ask("a", "fits", "123456789")
    answer = desk.answers["a"]
    assert isinstance(answer, GarrisonError)
    assert answer.code == "inference.context_length_exceeded"
    assert answer.fields == {"index": 1, "prompt_tokens": 9, "context_length": 8}
    assert not desk.batcher.busy


def test_only_who_asks_for_it_is_cut_short(desk: Desk) -> None:
    desk.ask("a", "aaaaaaaab", truncate=True)
    desk.run()
    assert sums(desk.answers["a"]) == [97 * 8]


@pytest.mark.parametrize(("given", "code"), [("", "inference.prompt_empty"), ((200,), "inference.prompt_unreadable")])
def test_what_is_no_input_is_refused(desk: Desk, given: Input, code: str) -> None:
    desk.ask("a", "fine", given)
    assert desk.code("a") == code


def test_a_failed_batch_ends_those_in_it_only(desk: Desk) -> None:
    desk.ask("a", "aaaaaa")
    desk.ask("b", "bbbbbb")
    desk.backend.fails = True
    desk.batcher.step()
    desk.backend.fails = False
    desk.run()
    assert desk.code("a") == "inference.decode_failed"
    assert sums(desk.answers["b"]) == [588]


def test_the_queue_is_bounded(desk: Desk) -> None:
    for number in range(MAX_WAITING):
        desk.ask(str(number), "a")
    desk.ask("one more", "a")
    assert desk.code("one more") == "inference.queue_full"
    desk.run()
    assert len(desk.answers) == MAX_WAITING + 1


def test_vectors_get_length_one_after_they_are_cut() -> None:
    whole = normalised(np.array([3, 4], np.float32), None)
    assert whole.tolist() == pytest.approx([0.6, 0.8])
    assert normalised(np.array([3, 4], np.float32), 1).tolist() == [1.0]


@pytest.mark.parametrize("values", [[0, 0], [np.nan, 1], [np.inf, 1]])
def test_a_vector_without_a_direction_is_an_error(values: list[float]) -> None:
    with pytest.raises(UnavailableError):
        normalised(np.array(values, np.float32), None)
