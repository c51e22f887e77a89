"""What this board trusts, and what it would refuse today and why, in plain sentences. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from garrison_agent.core.lease import DAY_S, Standing
from garrison_agent.core.time_floor import BUILT, CLOCK_TOLERANCE_S
from garrison_protocol.fleet import Fleet, FleetKey
from garrison_protocol.keys import key_id
from garrison_protocol.messages.enrolment import key_fingerprint
from garrison_protocol.states import Freshness, KeyPurpose

ROLES = frozenset({"root", "timestamp", "snapshot", "targets"})
"""Of the registry's metadata: on these all packages rest; the others are families."""
LISTENED_TO = (KeyPurpose.DIRECTOR, KeyPurpose.RECEIPT)
_ASKS = {KeyPurpose.DIRECTOR: "desired state and anchors", KeyPurpose.RECEIPT: "receipts"}


@dataclass(frozen=True)
class TrustFacts:
    """What is known when somebody asks. Times are Unix seconds."""

    freshness: Freshness
    root: int
    """Version of the newest root; 0: no metadata was ever verified."""
    fresh_at_s: float
    ends: Mapping[str, int]
    """When each role of the metadata ends."""
    fleet: Fleet | None
    clock_s: float
    floor_s: float
    signer: str
    """The id of the key on which the floor rests, or ``BUILT``."""
    anchored: bool
    """An anchor was believed since the agent started."""
    applied: int
    """Counter of the desired state that is followed."""
    lowest: int | None
    """The counter that the newest anchor named; None: there was none yet."""
    held: int | None = None
    """Counter of a desired state that waits for an anchor."""
    leases: Mapping[str, tuple[str, Standing]] = field(default_factory=dict)
    """Model id and lease by alias."""

    @property
    def now_s(self) -> float:
        """The later of clock and floor."""
        return max(self.clock_s, self.floor_s)


def day(moment_s: float) -> str:
    """Return a moment for people, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment_s))


def keys(facts: TrustFacts) -> list[FleetKey]:
    """Return the keys that this board listens to, ended ones included."""
    listed = () if facts.fleet is None else facts.fleet.keys
    return [key for purpose in LISTENED_TO for key in listed if key.purpose is purpose]


def fingerprint(key: FleetKey) -> str:
    """Return the key as people compare it."""
    return key_fingerprint(key.public)


def floor_source(facts: TrustFacts) -> str:
    """Return what the time floor rests on."""
    if facts.signer == BUILT:
        return "when this version was built, and time in operation since"
    known = next((key for key in keys(facts) if key_id(key.public) == facts.signer), None)
    return f"an anchor signed by director key {fingerprint(known) if known else facts.signer[:16]}, and time since"


def trusted(facts: TrustFacts) -> Iterator[str]:
    """Yield what this board trusts, one sentence each."""
    if facts.root:
        yield f"The registry's root, version {facts.root}, and what it names."
    for key in keys(facts):
        end = key.not_after.timestamp()
        until = "which ended" if end < facts.now_s else "until"
        yield f"{key.purpose.value.capitalize()} key {fingerprint(key)}, {until} {day(end)}."
    if facts.fresh_at_s:
        ends = ", ".join(f"{role} {day(end)}" for role, end in facts.ends.items())
        yield f"Metadata verified as fresh on {day(facts.fresh_at_s)}" + (f"; it ends: {ends}." if ends else ".")
    yield f"That it is {day(facts.floor_s)} or later: {floor_source(facts)}."
    for alias, (model, standing) in sorted(facts.leases.items()):
        then = "stops serving" if standing.stops else "serves on and says so"
        yield f"{alias}: {model} without news until {day(standing.ends_at_s)}; then it {then}."


def refused(facts: TrustFacts) -> Iterator[str]:
    """Yield what this board would refuse now though it were signed and newer, and why, one sentence each."""
    yield from _refused_models(facts)
    yield from _refused_messages(facts)
    if facts.anchored and facts.clock_s - facts.floor_s > DAY_S:
        yield (
            f"Whatever ends before {day(facts.clock_s)}, the board's clock: that is far ahead of what the controller "
            f"signed, {day(facts.floor_s)}. Set the clock."
        )
    for alias, (model, standing) in sorted(facts.leases.items()):
        if standing.ended and standing.stops:
            yield f"Requests to {alias}: the lease of {model} ended on {day(standing.ends_at_s)}."


def _refused_models(facts: TrustFacts) -> Iterator[str]:
    if not facts.root:
        yield "New models: this board has not verified the registry's metadata yet."
    ended = {role: end for role, end in facts.ends.items() if end < facts.now_s}
    if facts.root and facts.freshness is not Freshness.FRESH:
        why = ", ".join(f"{role} ended on {day(end)}" for role, end in ended.items() if role in ROLES)
        yield f"New models: {why or 'the registry has not confirmed its metadata since the agent started'}."
    for role, end in ended.items():
        if role not in ROLES:
            yield f"New models of {role}: what its signers signed ended on {day(end)}."
    if not facts.anchored and facts.clock_s < facts.floor_s - CLOCK_TOLERANCE_S:
        yield (
            f"New models: the clock says {day(facts.clock_s)}, which has passed for certain, and the controller has "
            "not told the time since the agent started."
        )


def _refused_messages(facts: TrustFacts) -> Iterator[str]:
    if facts.fleet is None:
        yield "Desired state, anchors, and receipts: no fleet.json was verified yet, so no key is known."
        return
    for purpose, what in _ASKS.items():
        ends = [key.not_after.timestamp() for key in keys(facts) if key.purpose is purpose]
        if not ends:
            yield f"{what.capitalize()}: fleet.json lists no {purpose.value} key."
        elif max(ends) < facts.now_s:
            yield f"{what.capitalize()}: the last {purpose.value} key ended on {day(max(ends))}."
    if facts.applied == 0 and facts.lowest is None:
        waiting = f" Number {facts.held} waits." if facts.held is not None else ""
        yield (
            "Desired state: this board's store is new, and the controller has not told yet how far the board had "
            f"been.{waiting}"
        )
    elif facts.lowest is not None and facts.lowest > facts.applied:
        yield f"Desired state below number {facts.lowest}, which the controller has signed for this board."
