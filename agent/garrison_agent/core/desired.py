"""Whether a desired state is accepted, and what it changes. Pure (docs/protocol.md, "Desired state")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from garrison_agent.core.slot import Assign, Slot, Withdraw
from garrison_protocol.messages.desired import Desired


@dataclass(frozen=True, slots=True)
class Applied:
    """The newest desired state this board has accepted. Counter 0: none yet."""

    counter: int = 0
    sha256: str | None = None
    """Of the exact body that was signed."""


class Verdict(StrEnum):
    """What to do with a desired state whose signature and device hold."""

    ACCEPT = "accept"
    REPEATED = "repeated"
    OLDER = "older"
    HOLD = "hold"
    """This board has no desired state, and nobody has told it yet how far it had been: the newest one it sees may be
    an old one."""
    BELOW_ANCHOR = "below_anchor"
    CONFLICT = "conflict"


def judge(applied: Applied, counter: int, sha256: str, lowest: int | None) -> Verdict:
    """Return the verdict: only a higher counter is accepted; an equal one with another digest is an alarm.

    ``lowest`` is the counter that the newest anchor named; None: there was none yet.
    """
    if counter > applied.counter:
        if lowest is None:
            return Verdict.ACCEPT if applied.counter else Verdict.HOLD
        return Verdict.ACCEPT if counter >= lowest else Verdict.BELOW_ANCHOR
    if counter < applied.counter:
        return Verdict.OLDER
    return Verdict.REPEATED if sha256 == applied.sha256 else Verdict.CONFLICT


def reconcile(slots: Mapping[str, Slot], desired: Desired) -> dict[str, Assign | Withdraw]:
    """Return one event per alias that ``desired`` names or no longer names.

    Aliases it repeats unchanged are in it as well: ``advance`` finds nothing to do for them. Where one alias stands
    twice, the last counts.
    """
    events: dict[str, Assign | Withdraw] = {
        alias: Withdraw() for alias, slot in slots.items() if slot.desired is not None
    }
    for entry in desired.aliases:
        events[entry.alias] = Assign(entry)
    return events
