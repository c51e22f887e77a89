from __future__ import annotations

import asyncio

import pytest

from garrison_agent.api.admission import Admission, duration
from garrison_agent.api.asgi import Caller, Request
from garrison_agent.api.errors import LimitedError, openai_body, retry_after_s
from garrison_agent.core.applications import Application, ApplicationTable
from tests.unit.api.test_guards import make_request


class Gate:
    """An admission with one application, whose clock and table the test holds."""

    def __init__(self, **limits: int) -> None:
        self.application = Application("camera", "0" * 64, 0, **limits)  # type: ignore[arg-type] # limits by name
        self.table = ApplicationTable((self.application,))
        self.now_s = 0.0
        self.admission = Admission(lambda: self.table, lambda: self.now_s)

    def request(self) -> Request:
        made = make_request()
        made.caller = Caller(self.application.name, self.application)
        return made

    def enter(self) -> Request:
        made = self.request()
        self.admission.enter(made)
        return made

    def refused(self) -> LimitedError:
        with pytest.raises(LimitedError) as caught:
            self.enter()
        return caught.value


def test_callers_without_a_key_have_no_limits() -> None:
    gate = Gate(requests_per_min=1)
    for _ in range(5):
        request = make_request()
        gate.admission.enter(request)
        assert request.answer_headers == []


def test_the_rate_of_requests() -> None:
    gate = Gate(requests_per_min=2)
    assert dict(gate.enter().answer_headers) == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"1",
        b"x-ratelimit-reset-requests": b"30s",
    }
    gate.enter()
    error = gate.refused()
    assert (error.code, error.http_status, retry_after_s(error)) == ("api.requests_limited", 429, 30)
    body = openai_body(error)["error"]
    assert isinstance(body, dict)
    assert (body["type"], body["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    gate.now_s = 29.0
    gate.refused()
    gate.now_s = 30.0
    gate.enter()
    gate.refused()


def test_a_refused_request_says_what_is_left_and_costs_nothing() -> None:
    gate = Gate(requests_per_min=1)
    gate.enter()
    request = gate.request()
    with pytest.raises(LimitedError):
        gate.admission.enter(request)
    assert (b"x-ratelimit-remaining-requests", b"0") in request.answer_headers
    gate.now_s = 60.0
    gate.enter()


def test_tokens_are_paid_afterwards() -> None:
    gate = Gate(tokens_per_min=600)
    assert (b"x-ratelimit-remaining-tokens", b"600") in gate.enter().answer_headers
    gate.table = gate.table.spent("camera", 700, 0.0)
    error = gate.refused()
    assert (error.code, retry_after_s(error)) == ("api.tokens_limited", 11)  # until one token is there
    gate.now_s = 10.1
    gate.enter()


def test_requests_at_once_are_counted_until_they_are_closed() -> None:
    gate = Gate(concurrent=2)
    first, _ = gate.enter(), gate.enter()
    assert gate.refused().code == "api.concurrency_limited"
    asyncio.run(first.close())
    gate.enter()
    gate.refused()


def test_one_request_counts_once_however_often_it_is_asked() -> None:
    gate = Gate(concurrent=2, requests_per_min=2)
    request = gate.enter()
    gate.admission.enter(request)
    gate.enter()
    asyncio.run(request.close())
    assert gate.refused().code == "api.requests_limited"


def test_new_limits_begin_anew_and_removed_applications_are_forgotten() -> None:
    gate = Gate(requests_per_min=1)
    gate.enter()
    other = Application("other", "1" * 64, 0)
    gate.table = ApplicationTable((other,))
    request = make_request()
    request.caller = Caller("other", other)
    gate.admission.enter(request)
    gate.table = ApplicationTable((gate.application,))
    gate.enter()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0165, "17ms"), (1, "1s"), (7.2, "8s"), (59.5, "1m0s"), (360, "6m0s")]
)
def test_durations_are_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text
