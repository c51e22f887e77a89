"""One stream through a board's local API, beside llama.cpp driven by nothing but a loop."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bench.result import Budget, Findings, Measure
from bench.serving import TEXT, serving_board
from bench.streams import rate, stream
from demo.packages import smollm2_file

PAIRS = 15
TOKENS = 128
PROMPT = "Once upon a time there was a lighthouse keeper who"


def measure(folder: Path) -> Findings:
    """Return tokens per second and their ratios; takes about two minutes.

    Raises:
        StepError: The board did not come into service.
    """
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    with serving_board(folder, TEXT, threads=threads, parallel=4) as board:
        raw = subprocess.Popen(
            [sys.executable, "-m", "bench.raw_llama", str(smollm2_file()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert raw.stdin is not None
        assert raw.stdout is not None
        try:
            assert raw.stdout.readline() == "ready\n"
            ours, theirs = [], []
            for number in range(PAIRS + 1):
                # Another prompt each time, the same on both sides: nothing of it is known from before.
                prompt = f"{number}. {PROMPT}"
                body = {"model": TEXT, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
                found = {}
                for side in ("ours", "raw") if number % 2 else ("raw", "ours"):
                    if side == "ours":
                        found[side] = rate([stream(board.port, "/v1/completions", body)])
                    else:
                        raw.stdin.write(json.dumps({"prompt": prompt, "tokens": TOKENS}) + "\n")
                        raw.stdin.flush()
                        found[side] = TOKENS / json.loads(raw.stdout.readline())["seconds"]
                if number:  # the first pair warms both up
                    ours.append(found["ours"])
                    theirs.append(found["raw"])
        finally:
            raw.stdin.close()
            raw.wait(60)
    ratios = tuple(one / other for one, other in zip(ours, theirs, strict=True))
    return Findings(
        f"SmolLM2-135M Q4_1, {TOKENS} greedy tokens after a prompt of about 14, threads = cores - 1 = {threads}, TCP"
        " loopback, a client of nothing but a socket; beside it `llama_decode` in a loop in a process of its own;"
        f" median of {PAIRS} pairs, their order turned each time, after one to warm up",
        (
            Measure(
                "one stream",
                statistics.median(ours),
                "tok/s",
                statistics.median(theirs),
                "raw loop",
                statistics.median(ratios),
                Budget("≥ 0.97 x the raw loop", 0.97, at_least=True, of_ratio=True),
                ratios,
            ),
        ),
    )
