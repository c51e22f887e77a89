"""How fast a model is, through the local API: llama-bench's method for text, latency and rate for tensors."""

from __future__ import annotations

import json
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from garrison_agent.cli.client import AgentClient
from garrison_protocol.errors import InvalidError
from garrison_protocol.manifest import LabelCase, Manifest

_TOKENS = range(1000, 8000)
"""Plain words in every vocabulary of today; control tokens stand before or behind."""
TENSOR_REQUESTS = 100
"""Requests in one repetition unless told otherwise."""

Shows = Callable[[str], object]
"""Hears what is being measured."""


@dataclass(frozen=True)
class Row:
    """One test. ``samples_ns`` has one time per repetition, ``samples_ts`` tokens (or requests) a second in each."""

    test: str
    unit: str
    n_prompt: int
    n_gen: int
    n_concurrent: int
    samples_ns: list[int] = field(default_factory=list)
    samples_ts: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    """Tensors, one by one: of every request."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that llama-bench has, by its names, and the percentiles of single requests."""
        fields: dict[str, Any] = {
            "test": self.test,
            "unit": self.unit,
            "n_prompt": self.n_prompt,
            "n_gen": self.n_gen,
            "n_concurrent": self.n_concurrent,
            "avg_ns": round(statistics.fmean(self.samples_ns)),
            "stddev_ns": round(_deviation(self.samples_ns)),
            "avg_ts": round(statistics.fmean(self.samples_ts), 3),
            "stddev_ts": round(_deviation(self.samples_ts), 3),
            "samples_ns": self.samples_ns,
            "samples_ts": [round(one, 3) for one in self.samples_ts],
        }
        if self.latencies_ms:
            ordered = sorted(self.latencies_ms)
            fields["latency_ms_p50"] = round(statistics.median(ordered), 3)
            fields["latency_ms_p95"] = round(ordered[math.ceil(0.95 * len(ordered)) - 1], 3)
        return fields


def _deviation(values: list[int] | list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure_text(
    client: AgentClient, model: str, *, prompt: int, generate: int, repetitions: int, concurrent: int, shows: Shows
) -> Iterator[Row]:
    """Yield the tests ``pp<prompt>``, ``tg<generate>``, and with ``concurrent`` > 1 ``tg`` of so many at once.

    Each is warmed up once. Prompts are random tokens, so that nothing of them is known from an earlier one; times of
    single requests are the worker's own. 0 leaves a test out.

    Raises:
        GarrisonError: What the model answered instead.
    """
    text = _Text(client, model)
    plans: list[tuple[Row, Callable[[Row], None]]] = []
    if prompt:
        plans.append((Row(f"pp{prompt}", "tok/s", prompt, 0, 1), text.read))
    if generate:
        plans.append((Row(f"tg{generate}", "tok/s", 0, generate, 1), text.write))
    if generate and concurrent > 1:
        plans.append((Row(f"tg{generate}@{concurrent}", "tok/s", 0, generate, concurrent), text.write_together))
    yield from _repeat(plans, repetitions, shows)


def measure_tensors(
    client: AgentClient, manifest: Manifest, *, requests: int, repetitions: int, concurrent: int, shows: Shows
) -> Iterator[Row]:
    """Yield the tests ``infer`` (one by one) and ``infer@<concurrent>``, with the input of an evaluation case.

    Raises:
        InvalidError: ``cli.no_input``; the manifest has no such case.
        GarrisonError: What the model answered instead.
    """
    tensors = _Tensors(client, manifest, requests)
    yield from _repeat(
        [
            (Row("infer", "req/s", 0, requests, 1), tensors.one_by_one),
            (Row(f"infer@{concurrent}", "req/s", 0, requests, concurrent), tensors.together),
        ],
        repetitions,
        shows,
    )


def _repeat(plans: list[tuple[Row, Callable[[Row], None]]], repetitions: int, shows: Shows) -> Iterator[Row]:
    for row, run in plans:
        shows(f"{row.test}, warm-up")
        run(Row(row.test, row.unit, row.n_prompt, row.n_gen, row.n_concurrent))
        for number in range(1, repetitions + 1):
            shows(f"{row.test}, {number} of {repetitions}")
            run(row)
        yield row


class _Text:
    def __init__(self, client: AgentClient, model: str) -> None:
        self._client = client
        self._model = model
        self._random = random.Random()  # noqa: S311 - words to read, not secrets

    def read(self, row: Row) -> None:
        """Time the way to the first token."""
        answer = self._complete(self._random.choices(_TOKENS, k=row.n_prompt), 1)
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        seconds = float(answer["timings"]["ttft_ms"]) / 1000
        row.samples_ns.append(round(seconds * 1e9))
        row.samples_ts.append((int(usage["prompt_tokens"]) - cached) / seconds)

    def write(self, row: Row) -> None:
        """Time the tokens after the first."""
        answer = self._complete(self._random.choices(_TOKENS, k=1), row.n_gen)
        rate = answer["timings"]["tokens_per_s"]
        if not rate:
            raise InvalidError("cli.too_short", f"{row.n_gen} tokens are too few to be timed", hint="-n 16 or more")
        row.samples_ns.append(round(int(answer["usage"]["completion_tokens"]) / rate * 1e9))
        row.samples_ts.append(float(rate))

    def write_together(self, row: Row) -> None:
        """Time several answers at once, from the first request to the end of the last answer."""

        def one(prompt: list[int]) -> int:
            return int(self._complete(prompt, row.n_gen)["usage"]["completion_tokens"])

        prompts = [self._random.choices(_TOKENS, k=1) for _ in range(row.n_concurrent)]
        with ThreadPoolExecutor(row.n_concurrent) as pool:
            began = time.perf_counter()
            tokens = sum(pool.map(one, prompts))
        seconds = time.perf_counter() - began
        row.samples_ns.append(round(seconds * 1e9))
        row.samples_ts.append(tokens / seconds)

    def _complete(self, prompt: list[int], tokens: int) -> Any:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return self._client.infer("/v1/completions", body)


class _Tensors:
    def __init__(self, client: AgentClient, manifest: Manifest, requests: int) -> None:
        case = next((one for one in manifest.evaluation.cases if isinstance(one, LabelCase)), None)
        if case is None:
            raise InvalidError(
                "cli.no_input",
                f"the manifest of {manifest.id} has no case with tensors to send",
                hint="ask its publisher",
            )
        self._client = client
        self._place = f"/v2/models/{quote(manifest.name)}/infer"
        inputs = [tensor.model_dump(mode="json") for tensor in case.inputs]
        self._body = json.dumps({"inputs": inputs}, separators=(",", ":")).encode()
        self._requests = requests

    def one_by_one(self, row: Row) -> None:
        """Time each request."""
        times = self._send(self._requests)
        row.samples_ns.append(round(statistics.fmean(times) * 1e9))
        row.samples_ts.append(len(times) / sum(times))
        row.latencies_ms.extend(seconds * 1000 for seconds in times)

    def together(self, row: Row) -> None:
        """Time all requests, sent over so many connections at once."""
        share = -(-self._requests // row.n_concurrent)
        start = threading.Barrier(row.n_concurrent + 1)

        def send() -> None:
            start.wait()
            self._send(share)

        with ThreadPoolExecutor(row.n_concurrent) as pool:
            sent = [pool.submit(send) for _ in range(row.n_concurrent)]
            start.wait()
            began = time.perf_counter()
            for one in sent:
                one.result()
        seconds = time.perf_counter() - began
        row.samples_ns.append(round(seconds * 1e9))
        row.samples_ts.append(share * row.n_concurrent / seconds)

    def _send(self, count: int) -> list[float]:
        times = []
        with self._client.keep() as connection:
            for _ in range(count):
                began = time.perf_counter()
                connection.infer(self._place, self._body)
                times.append(time.perf_counter() - began)
        return times
