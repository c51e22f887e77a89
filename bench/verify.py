"""How fast a worker checks a model file before it loads it, beside ``sha256sum``.

Both read the same file of random bytes, in turn, once from the page cache and once from the disk.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench.result import Budget, Findings, Measure
from garrison_agent.runtimes.spec import OpenFile
from garrison_agent.runtimes.verify import verify_files

FILE_BYTES = 1_000_000_000
ROUNDS = 5
_PIECE = 4 * 1024 * 1024


def measure(folder: Path) -> Findings:
    """Return speeds in MB/s and their ratios; takes about a minute and 1 GB of disk."""
    folder.mkdir(parents=True)
    path = folder / "model.bin"
    sha256 = _fill(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:

        def ours() -> None:
            verify_files([OpenFile("model.bin", sha256, FILE_BYTES, descriptor)])

        def theirs() -> None:
            found = subprocess.run(["sha256sum", str(path)], check=True, capture_output=True, text=True)
            assert found.stdout.startswith(sha256)

        budget = Budget("≥ 0.9 x sha256sum", 0.9, at_least=True, of_ratio=True)
        lines = []
        for what, before in (
            ("verify, in the page cache", lambda: None),
            ("verify, from the disk", lambda: _cold(path)),
        ):
            speeds = _in_turn([ours, theirs], before)
            ratios = tuple(one / other for one, other in zip(*speeds, strict=True))
            medians = [statistics.median(one) for one in speeds]
            lines.append(
                Measure(what, medians[0], "MB/s", medians[1], "sha256sum", statistics.median(ratios), budget, ratios)
            )
    finally:
        os.close(descriptor)
    return Findings(
        f"{FILE_BYTES / 1e9:.0f} GB of random bytes, median of {ROUNDS} rounds with the order turned each time. Ours:"
        " `verify_files`, as a worker runs it before every load. From the disk: the file's pages were dropped before"
        " (POSIX_FADV_DONTNEED), which not every file system obeys",
        tuple(lines),
    )


def _in_turn(subjects: list[Callable[[], None]], before: Callable[[], None]) -> list[list[float]]:
    """Return per subject the MB/s of each round; one round before warms everything up."""
    speeds: list[list[float]] = [[] for _ in subjects]
    for number in range(ROUNDS + 1):
        for place in range(len(subjects)):
            index = (number + place) % len(subjects)
            before()
            began_s = time.perf_counter()
            subjects[index]()
            if number:
                speeds[index].append(FILE_BYTES / 1e6 / (time.perf_counter() - began_s))
    return speeds


def _fill(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, FILE_BYTES, _PIECE):
            piece = os.urandom(min(_PIECE, FILE_BYTES - at))
            file.write(piece)
            whole.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return whole.hexdigest()


def _cold(path: Path) -> None:
    """Ask the kernel to forget the file's pages, which are all written by now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
