from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from garrison_agent.runtimes.llama.generation import Delta, Options, TokenLogprob
from garrison_agent.runtimes.openai.answers import Answer, Part
from garrison_agent.runtimes.openai.api_errors import ApiError
from garrison_protocol.errors import GarrisonError, InvalidError, UnavailableError

ACCEPTED = Delta("", None)


def scope(**headers: str) -> dict[str, Any]:
    return {"headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]}


def answer(copies: int = 1, **headers: str) -> Answer:
    made = Answer(scope(**headers))
    made.begin(Options(seed=7), "prompt", copies=copies)
    return made


def parts(made: Answer, hear: Callable[[], None]) -> list[Part]:
    """Return all parts of an answer that hears everything before anybody reads it."""

    async def read() -> list[Part]:
        hear()
        return [part async for part in made.parts()]

    return asyncio.run(read())


def test_who_asks_and_until_when_come_from_the_headers() -> None:
    made = answer(x_garrison_app="robot", x_garrison_timeout_ms="1500")
    (generation,) = made.generations
    assert generation.app == "robot"
    assert generation.deadline_s == pytest.approx(made.began + 1.5)
    assert made.to_record("chat", None).app == "robot"
    assert answer().generations[0].deadline_s is None


@pytest.mark.parametrize("value", ["", "-1", "1.5", "soon", "9" * 13])
def test_a_deadline_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ApiError) as refused:
        answer(x_garrison_timeout_ms=value)
    assert refused.value.status == 400


def test_copies_have_seeds_of_their_own_and_prompts_keep_their_order() -> None:
    made = Answer(scope())
    made.begin(Options(seed=7), "a", (1, 2), copies=2)
    assert [(one.prompt, one.options.seed) for one in made.generations] == [
        ("a", 7),
        ("a", 8),
        ((1, 2), 7),
        ((1, 2), 8),
    ]
    for generation, tokens in zip(made.generations, (3, 3, 5, 5), strict=True):
        generation.prompt_tokens, generation.completion_tokens = tokens, 2
    assert made.usage()["prompt_tokens"] == 8
    assert made.usage()["completion_tokens"] == 8


def test_what_came_together_is_one_part() -> None:
    made = answer()
    token = TokenLogprob(b"x", -1.0, ())
    hear = made.generations[0].on_delta
    deltas = [ACCEPTED, Delta("a", None, (token,)), Delta("b", None), Delta("c", "stop", (token,))]

    def hear_all() -> None:
        for delta in deltas:
            hear(delta)

    assert parts(made, hear_all) == [Part(0, "abc", "stop", (token, token))]
    assert made.finish == "stop"


def test_choices_are_told_apart_and_the_last_one_ends_the_answer() -> None:
    made = answer(copies=2)
    first, second = (one.on_delta for one in made.generations)

    async def read() -> list[tuple[Part, str | None]]:
        told: list[tuple[Part, str | None]] = []
        for hear in (first, second):
            hear(ACCEPTED)
        first(Delta("a", None))
        async for part in made.parts():
            told.append((part, made.finish))
            if len(told) == 2:
                second(Delta("b", "length"))
                first(Delta("", "stop"))
        return told

    told = asyncio.run(read())
    assert [(part.choice, part.text, part.finish, finish) for part, finish in told] == [
        (0, "a", None, None),
        (1, "", None, None),
        (1, "b", "length", None),
        (0, "", "stop", "stop"),
    ]


def test_one_refused_choice_refuses_the_request_and_stops_the_others() -> None:
    made = answer(copies=2)
    made.generations[1].error = UnavailableError("inference.queue_full", "full", retryable=True)

    def hear() -> None:
        made.generations[0].on_delta(ACCEPTED)
        made.generations[0].on_delta(Delta("a", None))
        made.generations[1].on_delta(Delta("", "error"))

    with pytest.raises(ApiError) as refused:
        parts(made, hear)
    assert refused.value.status == 503
    assert refused.value.headers == ((b"retry-after", b"2"),)
    assert made.generations[0].cancelled


def test_nothing_is_told_before_every_choice_was_accepted() -> None:
    """A refusal that comes later than another choice's first text still refuses the whole request."""
    made = answer(copies=2)
    first, second = made.generations
    told: list[Part] = []

    async def read() -> None:
        async for part in made.parts():
            told.append(part)

    async def refuse_late() -> None:
        reading = asyncio.create_task(read())
        first.on_delta(ACCEPTED)
        first.on_delta(Delta("a", None))
        for _ in range(3):
            await asyncio.sleep(0)
        second.error = UnavailableError("inference.queue_full", "full", retryable=True)
        second.on_delta(Delta("", "error"))
        await reading

    with pytest.raises(ApiError):
        asyncio.run(refuse_late())
    assert told == []


def test_a_later_failure_is_the_last_part_and_stops_the_others() -> None:
    made = answer(copies=2)

    def hear() -> None:
        for generation in made.generations:
            generation.on_delta(ACCEPTED)
        made.generations[1].error = UnavailableError("inference.decode_failed", "no")
        made.generations[1].on_delta(Delta("", "error"))
        made.generations[0].on_delta(Delta("more", None))

    *_, last = parts(made, hear)
    assert (last.choice, last.finish) == (1, "error")
    assert made.finish == "error"
    assert made.generations[0].cancelled
    assert made.to_record("chat", None).error_code == "inference.decode_failed"


def test_a_client_that_leaves_ends_an_answer_that_was_not_accepted_yet() -> None:
    made = answer(copies=2)
    assert parts(made, made.cancel)[-1].finish == "cancelled"
    assert [generation.cancelled for generation in made.generations] == [True, True]
    record = made.to_record("chat", None)
    assert (record.error_code, record.status) == ("inference.client_disconnected", 499)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidError("inference.prompt_empty", "x"), 400),
        (UnavailableError("inference.queue_full", "x"), 503),
        (UnavailableError("inference.deadline_exceeded", "x"), 504),
        (GarrisonError("inference.template_failed", "x"), 500),
    ],
)
def test_errors_have_the_status_that_says_whose_fault_they_are(error: GarrisonError, status: int) -> None:
    made = answer()
    made.generations[0].error = error
    with pytest.raises(ApiError) as refused:
        parts(made, lambda: made.generations[0].on_delta(Delta("", "error")))
    assert refused.value.status == status
    assert (refused.value.headers != ()) is (status == 503)


def test_times_are_those_of_all_generations() -> None:
    made = answer(copies=2)
    now = time.monotonic()
    for generation, first, last in zip(made.generations, (now + 2, now + 1), (now + 3, now + 5), strict=True):
        generation.first_token_at, generation.last_token_at, generation.completion_tokens = first, last, 5
    timings = made.timings()
    assert timings["ttft_ms"] == pytest.approx(1000, abs=100)
    assert timings["tokens_per_s"] == pytest.approx(9 / 4)
