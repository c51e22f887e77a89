"""Tensors through a board's unix socket, beside onnxruntime called directly, and many callers beside one."""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.result import Budget, Findings, Measure
from bench.serving import FILES, serving_board
from demo.packages import magika_file

ROUNDS = 9
SEQUENTIAL = 40
CALLERS = 32
PER_CALLER = 4
LENGTH = 2048
"""int32 values of Magika's input."""
_PATH = f"/v2/models/{FILES}/infer"


def measure(folder: Path) -> Findings:
    """Return requests per second and their ratios; takes about two minutes.

    Raises:
        StepError: The board did not come into service.
    """
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    with serving_board(folder, FILES, threads=threads, parallel=4) as board:
        direct = subprocess.Popen(
            [sys.executable, "-m", "bench.raw_onnx", str(magika_file()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )
        assert direct.stdin is not None
        assert direct.stdout is not None
        try:
            assert direct.stdout.readline() == "ready\n"
            single, parallel, raw = [], [], []
            for number in range(ROUNDS + 1):
                found = {}
                for side in ("single", "raw", "parallel")[:: 1 if number % 2 else -1]:
                    if side == "raw":
                        direct.stdin.write(f"{SEQUENTIAL}\n")
                        direct.stdin.flush()
                        found[side] = SEQUENTIAL / json.loads(direct.stdout.readline())["seconds"]
                    elif side == "single":
                        found[side] = _one_by_one(board.socket)
                    else:
                        found[side] = _in_parallel(board.socket)
                if number:
                    single.append(found["single"])
                    raw.append(found["raw"])
                    parallel.append(found["parallel"])
        finally:
            direct.stdin.close()
            direct.wait(60)
    alone = tuple(one / other for one, other in zip(single, raw, strict=True))
    together = tuple(one / other for one, other in zip(parallel, single, strict=True))
    return Findings(
        f"Magika standard_v3_3, int32[1,{LENGTH}] in and float32[1,214] out as binary tensors over the agent's unix"
        f" socket, threads = {threads}; one by one: {SEQUENTIAL} requests on one connection; in parallel: {CALLERS}"
        f" callers with {PER_CALLER} requests each; beside it `InferenceSession.run` in a process of its own; median of"
        f" {ROUNDS} rounds in turn, after one to warm up",
        (
            Measure(
                "one by one",
                statistics.median(single),
                "requests/s",
                statistics.median(raw),
                "onnxruntime",
                statistics.median(alone),
                Budget("≥ 0.7 x onnxruntime", 0.7, at_least=True, of_ratio=True),
                alone,
            ),
            Measure(
                f"{CALLERS} in parallel",
                statistics.median(parallel),
                "requests/s",
                statistics.median(single),
                "one by one",
                statistics.median(together),
                Budget("≥ 1.1 x one by one", 1.1, at_least=True, of_ratio=True),
                together,
            ),
        ),
    )


class _Caller(http.client.HTTPConnection):
    """Keeps one connection to a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def infer(self, seed: int) -> bytes:
        """Return the scores that come for one made-up file."""
        data = struct.pack(f"<{LENGTH}i", *((seed * 31 + index * 7) % 256 for index in range(LENGTH)))
        tensor = {"name": "bytes", "shape": [1, LENGTH], "datatype": "INT32"}
        header = json.dumps(
            {
                "inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}],
                "outputs": [{"name": "target_label", "parameters": {"binary_data": True}}],
            }
        ).encode()
        headers = {
            "Inference-Header-Content-Length": str(len(header)),
            "Content-Type": "application/octet-stream",
        }
        self.request("POST", _PATH, header + data, headers)
        response = self.getresponse()
        body = response.read()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {body[:300]!r}")
        return body[int(response.headers["Inference-Header-Content-Length"]) :]


def _one_by_one(path: Path) -> float:
    caller = _Caller(path)
    began_s = time.perf_counter()
    for number in range(SEQUENTIAL):
        caller.infer(number)
    rate = SEQUENTIAL / (time.perf_counter() - began_s)
    caller.close()
    return rate


def _in_parallel(path: Path) -> float:
    barrier = threading.Barrier(CALLERS + 1)

    def call(number: int) -> None:
        caller = _Caller(path)
        barrier.wait()
        for turn in range(PER_CALLER):
            caller.infer(number * PER_CALLER + turn)
        caller.close()

    with ThreadPoolExecutor(CALLERS) as callers:
        done = [callers.submit(call, number) for number in range(CALLERS)]
        barrier.wait()
        began_s = time.perf_counter()
        for one in done:
            one.result()
    return CALLERS * PER_CALLER / (time.perf_counter() - began_s)
