"""A model of bytes that counts: after a byte comes its successor; 0 ends. It refuses what a real context would.

It remembers what each sequence holds and fails on a wrong position, on more rows than a batch takes, on a copy into a
sequence that holds something, and on sampling a row whose logits nobody asked for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from garrison_agent.runtimes.llama.backend import DecodeError, InterruptedDecodeError, Row
from garrison_agent.runtimes.llama.generation import Options, TokenLogprob
from garrison_protocol.errors import GarrisonError, InvalidError

BYTES_PER_TOKEN = 100


class CountingBackend:
    """Implements ``backend.Backend``. A grammar is the set of characters that it allows."""

    scored_rows = 4
    vocabulary = 256

    def __init__(self, *, parallel: int = 2, context_length: int = 64, batch_size: int = 8) -> None:
        self.parallel = parallel
        self.context_length = context_length
        self.batch_size = batch_size
        self.trims = True
        self.batches: list[list[Row]] = []
        self.held: dict[int, list[int]] = {sequence: [] for sequence in range(parallel)}
        self.samplers_open = 0
        self.saves = 0
        self.restores = 0
        self.spoiled: set[int] = set()
        """Sequences that an interruption left half changed: a model that cannot go back has one state for each."""
        self.fail_next = False
        self.fail_restore = False
        self.interrupted = threading.Event()
        self.interruptions = 0
        self.while_decoding: Callable[[], None] | None = None
        """Runs in the middle of the next decode: what another thread does meanwhile."""
        self.row_takes: Callable[[], None] | None = None
        """Runs for each row that is read."""
        self.sampling_fails: GarrisonError | None = None
        self.control: dict[int, bytes] = {}
        """Control tokens and their names."""

    @property
    def read(self) -> int:
        """How many tokens were read so far."""
        return sum(map(len, self.batches))

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return b"" if token in self.control else bytes([token])

    def name(self, token: int) -> bytes:
        return self.control.get(token, bytes([token]))

    def ends(self, token: int) -> bool:
        return token == 0

    def forget(self, sequence: int, start: int) -> bool:
        if not self.trims and 0 < start < len(self.held[sequence]):
            return False
        if start == 0:
            self.spoiled.discard(sequence)
        del self.held[sequence][start:]
        return True

    def share(self, source: int, target: int, count: int) -> None:
        assert self.trims
        assert source != target
        assert not self.held[target]
        assert 0 < count <= len(self.held[source])
        self.held[target] = self.held[source][:count]

    def save(self, sequence: int, limit_bytes: int) -> bytes | None:
        self.saves += 1
        state = bytes(self.held[sequence]).ljust(len(self.held[sequence]) * BYTES_PER_TOKEN, b".")
        return state if len(state) <= limit_bytes else None

    def restore(self, sequence: int, saved: bytes | bytearray) -> bool:
        assert not self.held[sequence]
        if self.fail_restore:
            return False
        self.restores += 1
        self.held[sequence] = list(saved[: len(saved) // BYTES_PER_TOKEN])
        return True

    def decode(self, rows: Sequence[Row]) -> None:
        assert 0 < len(rows) <= self.batch_size
        if self.fail_next:
            self.fail_next = False
            raise DecodeError("asked to fail")
        if self.while_decoding is not None:
            act, self.while_decoding = self.while_decoding, None
            act()
        if self.interrupted.is_set():
            self.interruptions += 1
            if not self.trims:
                self.spoiled.update(row.sequence for row in rows)
            raise InterruptedDecodeError
        for row in rows:
            assert row.sequence not in self.spoiled
            assert row.position == len(self.held[row.sequence])
            self.held[row.sequence].append(row.token)
            if self.row_takes is not None:
                self.row_takes()
        assert all(len(held) <= self.context_length for held in self.held.values())
        self.batches.append(list(rows))

    def interrupt(self, on: bool) -> None:
        if on:
            self.interrupted.set()
        else:
            self.interrupted.clear()

    def sampler(self, options: Options, prompt: Sequence[int]) -> _Successor:
        if options.grammar == "":
            raise InvalidError("inference.grammar_invalid", "it is empty")
        self.samplers_open += 1
        return _Successor(self, options.grammar)

    def log_probability(self, row: int, token: int) -> float:
        read = self.batches[-1][row]
        assert read.wanted
        if token == ord("?"):
            return math.nan
        return -0.5 if token == read.token + 1 else -5.0

    def token_logprob(self, row: int, token: int, top: int) -> TokenLogprob:
        likeliest = [(self.name((token + more) % 256), self.log_probability(row, token + more)) for more in range(top)]
        return TokenLogprob(self.name(token), self.log_probability(row, token), tuple(likeliest))


class _Successor:
    def __init__(self, backend: CountingBackend, grammar: str | None) -> None:
        self._backend = backend
        self._grammar = grammar

    def sample(self, row: int) -> int | None:
        read = self._backend.batches[-1][row]
        assert read.wanted
        if self._backend.sampling_fails is not None:
            raise self._backend.sampling_fails
        token = 0 if read.token == ord("z") else read.token + 1
        return None if self._grammar is not None and chr(token) not in self._grammar else token

    def close(self) -> None:
        self._backend.samplers_open -= 1
