"""Whether an application may ask a model now: its rate, its tokens, and how many of its requests are in progress.

Requests are counted here, on the API's event loop. Tokens are counted by the owner thread, which hears from the workers
how many there were; they are paid afterwards, so one request may go into debt, and the next ones wait for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from garrison_agent.api.asgi import Request
from garrison_agent.api.errors import LimitedError
from garrison_agent.core.applications import Application, ApplicationTable
from garrison_agent.core.rate import Bucket

BUSY_RETRY_S = 1
"""What an application with too many requests in progress is told to wait."""


class Admission:
    """One for all doors. Event loop only."""

    def __init__(
        self, table: Callable[[], ApplicationTable], monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._table = table
        self._monotonic_s = monotonic_s
        self._known: ApplicationTable | None = None
        self._requests: dict[str, Bucket] = {}
        self._active: dict[str, int] = {}

    def enter(self, request: Request) -> None:
        """Count ``request`` until it is closed; once, however often it is asked. Sets OpenAI's ``x-ratelimit-*``.

        Raises:
            LimitedError: ``api.concurrency_limited``, ``api.tokens_limited``, or ``api.requests_limited``.
        """
        application = request.caller.application
        if application is None or request.admitted:
            return
        now_s = self._monotonic_s()
        table = self._table()
        self._forget_others(table)
        requests, tokens = self._buckets(application, table, now_s)
        try:
            self._check(application, requests, tokens, now_s)
            if requests is not None:
                requests = self._requests[application.name] = requests.take(1, now_s)
        finally:
            request.answer_headers += _headers(requests, tokens, now_s)
        request.admitted = True
        self._active[application.name] = self._active.get(application.name, 0) + 1
        request.at_close(lambda: self._leave(application.name))

    def _buckets(
        self, application: Application, table: ApplicationTable, now_s: float
    ) -> tuple[Bucket | None, Bucket | None]:
        requests = tokens = None
        if application.requests_per_min:
            requests = self._requests.get(application.name)
            if requests is None or requests.per_minute != application.requests_per_min:
                requests = Bucket.full(application.requests_per_min, now_s)
        if application.tokens_per_min:
            tokens = table.tokens.get(application.name) or Bucket.full(application.tokens_per_min, now_s)
        return requests, tokens

    def _check(self, application: Application, requests: Bucket | None, tokens: Bucket | None, now_s: float) -> None:
        active = self._active.get(application.name, 0)
        if application.concurrent and active >= application.concurrent:
            raise LimitedError(
                "api.concurrency_limited",
                f"{application.name} has {active} requests in progress, and may have no more",
                hint="wait for one of them to end",
                retryable=True,
                retry_after_s=BUSY_RETRY_S,
            )
        if tokens is not None and (wait_s := tokens.wait_s(1, now_s)) > 0:
            raise LimitedError(
                "api.tokens_limited",
                f"{application.name} has used its {tokens.per_minute} tokens a minute",
                hint="wait as long as Retry-After says",
                retryable=True,
                retry_after_s=math.ceil(wait_s),
            )
        if requests is not None and (wait_s := requests.wait_s(1, now_s)) > 0:
            raise LimitedError(
                "api.requests_limited",
                f"{application.name} has used its {requests.per_minute} requests a minute",
                hint="wait as long as Retry-After says",
                retryable=True,
                retry_after_s=math.ceil(wait_s),
            )

    def _leave(self, name: str) -> None:
        left = self._active[name] - 1
        if left:
            self._active[name] = left
        else:
            del self._active[name]

    def _forget_others(self, table: ApplicationTable) -> None:
        """Drop the counts of applications that were removed."""
        if self._known is None or self._known.applications is not table.applications:
            names = {application.name for application in table.applications}
            self._requests = {name: bucket for name, bucket in self._requests.items() if name in names}
        self._known = table


def _headers(requests: Bucket | None, tokens: Bucket | None, now_s: float) -> list[tuple[bytes, bytes]]:
    headers = []
    for what, bucket in ((b"requests", requests), (b"tokens", tokens)):
        if bucket is not None:
            left = max(0, math.floor(bucket.left(now_s)))
            headers += [
                (b"x-ratelimit-limit-" + what, str(bucket.per_minute).encode()),
                (b"x-ratelimit-remaining-" + what, str(left).encode()),
                (b"x-ratelimit-reset-" + what, duration(bucket.full_s(now_s)).encode()),
            ]
    return headers


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers give it: ``17ms``, ``8s``, ``6m0s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
