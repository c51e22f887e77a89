"""A model of bytes that counts: after a byte comes its successor; 0 ends. It refuses what a real context would.

It remembers what each sequence holds and fails on a wrong position, on more rows than a batch takes, and on sampling
a row whose logits nobody asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from garrison_agent.runtimes.batching import DecodeError, Options, Row


class CountingBackend:
    """Implements ``batching.Backend``."""

    scored_rows = 4

    def __init__(self, *, parallel: int = 2, context_length: int = 64, batch_size: int = 8) -> None:
        self.parallel = parallel
        self.context_length = context_length
        self.batch_size = batch_size
        self.batches: list[list[Row]] = []
        self.held: dict[int, list[int]] = {sequence: [] for sequence in range(parallel)}
        self.samplers_open = 0
        self.only_whole = False
        self.fail_next = False

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def ends(self, token: int) -> bool:
        return token == 0

    def forget(self, sequence: int, start: int) -> bool:
        if self.only_whole and 0 < start < len(self.held[sequence]):
            return False
        del self.held[sequence][start:]
        return True

    def decode(self, rows: Sequence[Row]) -> None:
        assert 0 < len(rows) <= self.batch_size
        if self.fail_next:
            self.fail_next = False
            raise DecodeError("asked to fail")
        for row in rows:
            assert row.position == len(self.held[row.sequence])
            self.held[row.sequence].append(row.token)
        assert sum(map(len, self.held.values())) <= self.context_length * self.parallel
        self.batches.append(list(rows))

    def sampler(self, options: Options) -> _Successor:
        self.samplers_open += 1
        return _Successor(self)

    def log_probability(self, row: int, token: int) -> float:
        read = self.batches[-1][row]
        assert read.wanted
        if token == ord("?"):
            return math.nan
        return -0.5 if token == read.token + 1 else -5.0


class _Successor:
    def __init__(self, backend: CountingBackend) -> None:
        self._backend = backend

    def sample(self, row: int) -> int:
        read = self._backend.batches[-1][row]
        assert read.wanted
        return 0 if read.token == ord("z") else read.token + 1

    def close(self) -> None:
        self._backend.samplers_open -= 1
