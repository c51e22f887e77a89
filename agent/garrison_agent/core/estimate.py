"""How much memory a worker takes: the manifest's estimate, corrected by what was measured on this board. Pure.

What is counted, in MiB, is the resident memory of the worker: private memory (keys and values, buffers, the
interpreter) and the pages of the model's file that it has mapped. Those pages could be dropped under pressure, but
every token reads them all, so a model whose weights are not in memory does not serve. Pages that were read only while
loading (weights that the engine rearranges into private memory) are not counted: the worker resets the kernel's peak
once it is ready.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 1024 * 1024
FACTOR = 1.5
"""How much more than its estimate a worker may take before the kernel ends it."""
SLACK_MB = 256


@dataclass(frozen=True, slots=True)
class Measured:
    """What one variant took on this board, loaded with a context of ``tokens``, all sequences together."""

    peak_mb: int
    tokens: int
    kv_bytes_per_token: int = 0
    """From the engine, once it has read the model; 0: unknown, or none."""
    load_ms: int = 0
    used: bool = False
    """Requests were answered before the peak was read: it holds what an answer takes too."""


def estimate_mb(manifest_mb: int, files_bytes: int, tokens: int, measured: Measured | None) -> int:
    """Return how much a worker of the variant will take with a context of ``tokens``.

    Before the first load the manifest's number stands, but never less than the files. A measured peak replaces it once
    requests were answered; for another context it is corrected by the exact size of the keys and values.
    """
    prior_mb = max(manifest_mb, -(-files_bytes // MIB))
    if measured is None:
        return prior_mb
    more = (tokens - measured.tokens) * measured.kv_bytes_per_token
    known_mb = max(1, measured.peak_mb + -(-more // MIB))
    return (
        known_mb
        if measured.used and (measured.kv_bytes_per_token or tokens <= measured.tokens)
        else max(known_mb, prior_mb)
    )


def learn(before: Measured | None, now: Measured) -> Measured:
    """Return what is known after another measurement: the highest peak for the newest context, and the newest facts.

    The smaller context's peak is carried over to the larger one's terms, so nothing that was learnt is lost.
    """
    if before is None:
        return now
    kv = now.kv_bytes_per_token or before.kv_bytes_per_token
    carried_mb = before.peak_mb + -(-(now.tokens - before.tokens) * kv // MIB)
    comparable = kv > 0 or now.tokens == before.tokens
    return replace(
        now,
        peak_mb=max(now.peak_mb, carried_mb) if comparable else now.peak_mb,
        kv_bytes_per_token=kv,
        load_ms=now.load_ms or before.load_ms,
        used=now.used or (comparable and before.used),
    )


def limit_mb(estimate: int, budget_mb: int, measured: Measured | None) -> int:
    """Return the memory beyond which a worker is ended: far above its estimate where that was measured.

    A manifest's estimate is somebody's guess about another machine; until the first measurement the whole budget is
    the limit.
    """
    if measured is None or not measured.used:
        return max(budget_mb, estimate)
    return max(round(estimate * FACTOR), estimate + SLACK_MB)
