"""When a board renews its TLS certificate, and how long it waits between tries. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from garrison_agent.core.retry import Backoff, jittered

RENEW_AFTER = 2 / 3
"""Of the certificate's life: a third is left for a controller or a network that is away."""
SPREAD = 1 / 60
"""Of the life, at most ``MAX_SPREAD_S``: boards that were enrolled in the same minute do not renew in the same."""
MAX_SPREAD_S = 3600.0
EARLY = Backoff(base_s=60, cap_s=6 * 3600)
"""The old certificate still works."""
ENDED = Backoff(base_s=10, cap_s=600)
"""It does not, and the board is cut off from the broker."""
REFUSED = Backoff(base_s=1800, cap_s=6 * 3600)
"""The controller said no; somebody has to do something first."""


@dataclass(frozen=True, slots=True)
class Validity:
    """The span of a certificate in Unix seconds."""

    start_s: float
    end_s: float

    @property
    def renew_at_s(self) -> float:
        """From when on it is to be renewed."""
        return self.start_s + (self.end_s - self.start_s) * RENEW_AFTER

    def ended(self, at_s: float) -> bool:
        """Tell whether it has ended; ``at_s`` is the later of clock and floor."""
        return at_s > self.end_s


@dataclass(frozen=True, slots=True)
class Tries:
    """What came of the tries to renew: how many failed, and whether the last was a refusal.

    So does a certificate count that is to be renewed already: asking at once for one more changes nothing.
    """

    failed: int = 0
    refused: bool = False


def is_due(validity: Validity | None, at_s: float) -> bool:
    """Tell whether to renew now; None is a certificate that cannot be used at all. ``at_s`` as in ``ended``."""
    return validity is None or at_s >= validity.renew_at_s


def wait_s(validity: Validity | None, tries: Tries, at_s: float, chance: float) -> float:
    """Return the seconds before the next try of a renewal that is due; ``chance`` in [0, 1) spreads it."""
    useless = validity is None or validity.ended(at_s)
    if tries.failed:
        backoff = REFUSED if tries.refused else ENDED if useless else EARLY
        return jittered(backoff.delay_s(tries.failed), chance)
    if validity is None or useless:
        return chance * ENDED.base_s
    return chance * min(MAX_SPREAD_S, (validity.end_s - validity.start_s) * SPREAD)
