"""What the batcher needs of a loaded model. ``native_backend`` has the real one; tests have one that counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from garrison_agent.runtimes.llama.generation import Options, TokenLogprob


class Row(NamedTuple):
    """One token of a batch. ``wanted``: its logits are read afterwards, under the row's index."""

    token: int
    position: int
    sequence: int
    wanted: bool


class DecodeError(Exception):
    """The backend could not decode a batch; the sequences in it are lost."""


class InterruptedDecodeError(Exception):
    """The backend stopped in the middle, as asked; of this batch, nothing was kept."""


class Sampler(Protocol):
    """Chooses tokens for one answer."""

    def sample(self, row: int) -> int | None:
        """Return the token that follows ``row`` of the last batch; None if the grammar lets nothing follow.

        Raises:
            GarrisonError: This answer cannot go on; others can.
        """

    def close(self) -> None:
        """Free the native sampler."""


class Memory(Protocol):
    """The keys and values of each sequence."""

    trims: bool
    """Whether the beginning of a sequence can be kept without its end, and shared; if not, only the whole can."""

    def forget(self, sequence: int, start: int) -> bool:
        """Drop what is known of ``sequence`` from position ``start`` on; False if the model can only drop it whole."""

    def share(self, source: int, target: int, count: int) -> None:
        """Let the empty sequence ``target`` begin with the first ``count`` tokens of ``source``; only if ``trims``."""

    def save(self, sequence: int, limit_bytes: int) -> bytes | bytearray | None:
        """Return a copy of what is known of ``sequence``; None if it has more than ``limit_bytes``."""

    def restore(self, sequence: int, saved: bytes | bytearray) -> bool:
        """Bring a copy back into the empty ``sequence``; False, and it stays empty, if that fails."""


class Backend(Memory, Protocol):
    """A loaded model with ``parallel`` sequences of ``context_length`` tokens each."""

    context_length: int
    parallel: int
    batch_size: int
    vocabulary: int
    scored_rows: int
    """How many rows of one batch may be ``wanted`` for scoring."""

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``, with the model's own beginning."""

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; control tokens have none."""

    def name(self, token: int) -> bytes:
        """Return the bytes of ``token``; of a control token, those of its name."""

    def ends(self, token: int) -> bool:
        """Tell whether ``token`` ends an answer."""

    def decode(self, rows: Sequence[Row]) -> None:
        """Read ``rows``. Raises ``DecodeError`` and ``InterruptedDecodeError``."""

    def interrupt(self, on: bool) -> None:
        """Stop the decode that is running, and those that begin, until switched off; from any thread."""

    def sampler(self, options: Options, prompt: Sequence[int]) -> Sampler:
        """Return a sampler for one answer. Raises ``InvalidError`` for a grammar that it cannot use."""

    def log_probability(self, row: int, token: int) -> float:
        """Return the natural logarithm of the probability of ``token`` after ``row``; NaN if there is none."""

    def token_logprob(self, row: int, token: int, top: int) -> TokenLogprob:
        """Return how likely ``token`` was after ``row``, and the ``top`` likeliest."""
