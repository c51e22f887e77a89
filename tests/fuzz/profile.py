"""How generated tests run: the same input every time, bounded, and without a clock."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator

from hypothesis import HealthCheck, settings

FAST = settings(
    derandomize=True, max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
SLOW = settings(FAST, max_examples=25)
"""For readers that touch a disk."""
PEAK_BYTES = 64 * 1024 * 1024
"""More than any honest input takes, far less than a board has."""


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Assert that the block never holds more than ``PEAK_BYTES``."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
