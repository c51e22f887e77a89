"""Whether a worker that has requests gets on with them. Pure.

A worker is asked for its health from time to time while requests are in flight, and never otherwise. Any difference
between two answers is progress: tokens, decoding steps, finished requests. So is having nothing to do. A worker whose
single steps are long (a tensor model's run) says how long one may take: it ends a longer one by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

CHECKS = 4
"""How often a worker is looked at within the time after which it counts as stalled."""
MAX_STEP_S = 86400.0
"""A worker's word for more than that is not believed."""


@dataclass(frozen=True, slots=True)
class Watch:
    """One worker with requests in flight. Times are monotonic seconds."""

    progress_at_s: float
    seen: str = ""
    """Its health as it was last told."""
    step_timeout_s: float = 0.0
    """How long one step may take, by the worker's own word."""


def watch(before: Watch, health: Mapping[str, object] | None, now_s: float) -> Watch:
    """Return the watch after a look; ``health`` None: there was no answer."""
    if health is None:
        return before
    seen = repr(sorted(health.items()))
    stated = health.get("step_timeout_s")
    if not isinstance(stated, int | float) or not 0 <= stated <= MAX_STEP_S:
        stated = 0.0
    before = replace(before, step_timeout_s=float(stated))
    at_rest = health.get("active") == 0 and health.get("queued") == 0
    if seen == before.seen and not at_rest:
        return before
    return replace(before, progress_at_s=now_s, seen=seen)


def stalled(one: Watch, timeout_s: float, now_s: float) -> bool:
    """Tell whether nothing has moved for ``timeout_s``, or for what a step may take if that is longer."""
    return now_s - one.progress_at_s >= max(timeout_s, one.step_timeout_s)
