"""Several streams at once, beside llama-cpp-python's server and, where it is at hand, llama.cpp's own."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.result import Budget, Findings, Measure
from bench.servers import Server, llama_server, python_server
from bench.serving import TEXT, serving_board
from bench.streams import Streamed, rate, side_by_side
from demo.processes import StepError

ROUNDS = 7
TOKENS = 64
STREAMS = (1, 4, 8)
WARM_UP = 1
_SUBJECTS = ("the sea", "a mountain", "winter", "a train", "bread", "the moon", "a garden", "two brothers")
_BUDGETS = {1: 1.0, 4: 1.7, 8: 1.7}
_FIRST_BUDGET = {4: 0.1}
_NATIVE_BUDGET = 0.95


def measure(folder: Path) -> Findings:
    """Return total tokens per second and slowest first tokens; takes about five minutes.

    Raises:
        StepError: A server did not start.
    """
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    measures: list[Measure] = []
    with ExitStack() as stack:
        board = stack.enter_context(serving_board(folder, TEXT, threads=threads, parallel=max(STREAMS)))
        ours = Server("garrison", board.port)
        python = stack.enter_context(python_server(folder, threads=threads))
        native = stack.enter_context(llama_server(folder, threads=threads, parallel=max(STREAMS)))
        servers = [ours, python, *([native] if native is not None else [])]
        for streams in STREAMS:
            found = _in_turn(servers, streams)
            measures += _compare(streams, found, python.name)
            if native is not None:
                measures.append(_rates(streams, found, native.name, _NATIVE_BUDGET))
    others = "" if native is not None else "; llama-server was not at hand"
    return Findings(
        f"SmolLM2-135M Q4_1, {TOKENS} greedy tokens after a short prompt, {'/'.join(map(str, STREAMS))} streams asked"
        f" for at once, threads = {threads}; tokens per second of all together, from the first request to the last end;"
        f" slowest first token of a round; median of {ROUNDS} rounds in turn, after {WARM_UP} to warm up{others}",
        tuple(measures),
    )


def _in_turn(servers: Sequence[Server], streams: int) -> dict[str, list[list[Streamed]]]:
    found: dict[str, list[list[Streamed]]] = {server.name: [] for server in servers}
    for number in range(ROUNDS + WARM_UP):
        turn = number % len(servers)
        for server in (*servers[turn:], *servers[:turn]):
            bodies = [
                {
                    "model": TEXT if server.name == "garrison" else "",
                    "prompt": f"{number}. A story about {_SUBJECTS[one]}. Once upon a time",
                    "max_tokens": TOKENS,
                    "temperature": 0,
                    # llama-cpp-python's server knows no ignore_eos; both have this. 2 ends SmolLM2's answers.
                    "logit_bias": {"2": -100, "0": -100},
                }
                for one in range(streams)
            ]
            try:
                answers = side_by_side(server.port, "/v1/completions", bodies)
            except ValueError as error:
                raise StepError(f"{server.name}: {error}") from error
            if number >= WARM_UP:
                found[server.name].append(answers)
    return found


def _compare(streams: int, found: dict[str, list[list[Streamed]]], other: str) -> list[Measure]:
    measures = [_rates(streams, found, other, _BUDGETS[streams])]
    firsts = [[max(one.to_first_s for one in answers) for answers in found[name]] for name in ("garrison", other)]
    ratios = tuple(one / beside for one, beside in zip(*firsts, strict=True))
    limit = _FIRST_BUDGET.get(streams)
    measures.append(
        Measure(
            f"{streams} streams, slowest first token",
            1000 * statistics.median(firsts[0]),
            "ms",
            1000 * statistics.median(firsts[1]),
            other,
            statistics.median(ratios),
            None if limit is None else Budget(f"≤ {limit} x {other}", limit, at_least=False, of_ratio=True),
            ratios,
        )
    )
    return measures


def _rates(streams: int, found: dict[str, list[list[Streamed]]], other: str, limit: float) -> Measure:
    rates = [[rate(answers) for answers in found[name]] for name in ("garrison", other)]
    ratios = tuple(one / beside for one, beside in zip(*rates, strict=True))
    return Measure(
        f"{streams} streams",
        statistics.median(rates[0]),
        "tok/s",
        statistics.median(rates[1]),
        other,
        statistics.median(ratios),
        Budget(f"≥ {limit} x {other}", limit, at_least=True, of_ratio=True),
        ratios,
    )
