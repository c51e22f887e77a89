"""How long a model may serve without news of the registry. Pure (docs/protocol.md, "Freshness and leases").

A lease is judged by the later of clock and time floor. What has run out stays so until fresh metadata is verified
again: a clock that is put back renews nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from garrison_agent.core.slot import LeaseEnded, LeaseRenewed, Slot
from garrison_protocol.manifest import Lease

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Standing:
    """One lease at one moment. Times are Unix seconds."""

    lease: Lease
    fresh_at_s: float
    """When this board last verified fresh metadata."""
    now_s: float

    @property
    def ends_at_s(self) -> float:
        """When it runs out, unless fresh metadata is verified before."""
        return self.fresh_at_s + self.lease.days * DAY_S

    @property
    def ended(self) -> bool:
        """Whether it has run out by now."""
        return self.now_s > self.ends_at_s

    @property
    def stops(self) -> bool:
        """Whether the model stops serving then."""
        return self.lease.on_expiry == "stop"


def changes(
    slots: Mapping[str, Slot], leases: Mapping[str, Lease | None], *, fresh_at_s: float, now_s: float
) -> dict[str, LeaseEnded | LeaseRenewed]:
    """Return an event for each alias whose serving package's lease has run out, or counts anew.

    ``leases`` holds the lease of the package that serves under each alias; an alias whose manifest cannot be read now
    is left out, and stays as it is.
    """
    events: dict[str, LeaseEnded | LeaseRenewed] = {}
    for alias, lease in leases.items():
        slot = slots[alias]
        if slot.serving is None:
            continue
        package, lapse = slot.serving.package, slot.lapse
        ended = lease is not None and Standing(lease, fresh_at_s, now_s).ended
        if not slot.lease_ended and lease is not None and ended:
            stops = Standing(lease, fresh_at_s, now_s).stops
            events[alias] = LeaseEnded(package, stops=stops, fresh_at_s=fresh_at_s)
        elif slot.lease_ended and lapse is not None and not ended and lapse.fresh_at_s != fresh_at_s:
            events[alias] = LeaseRenewed(package)
    return events
