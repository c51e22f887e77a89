"""Whether this board's record is the one that the controller has, or that of a lost or older store. Pure.

Source: docs/protocol.md, "A lost or older store".
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum

from garrison_protocol.messages.anchor import Committed
from garrison_protocol.messages.report import Head


class Fit(StrEnum):
    """What the controller's newest row of a stream says about this board's store."""

    SAME = "same"
    """This store has that row, or wrote it once: go on."""
    NEW = "new"
    """This store never had anything confirmed, and the controller knows an earlier one: that was lost."""
    OLDER = "older"
    """The controller has rows that this store lacks or contradicts: go on under numbers that are not taken."""


def compare(
    ours: Head, theirs: Committed | None, hash_of: Callable[[int], str | None], earlier: Collection[str]
) -> Fit:
    """Return what ``theirs`` says about the stream whose newest row is ``ours``.

    ``hash_of`` gives the hash of our row of a number, None where it was thinned; ``earlier`` the epochs that came
    before ours, as far as this store knows: a controller that names one of them is itself behind (put back from a
    backup), and asks for what it lacks.
    """
    if theirs is None:
        return Fit.SAME
    if theirs.epoch != ours.epoch:
        if theirs.epoch in earlier:
            return Fit.SAME
        return Fit.OLDER if ours.acked else Fit.NEW
    if theirs.seq > ours.seq:
        return Fit.OLDER
    known = hash_of(theirs.seq)
    return Fit.SAME if known is None or theirs.hash in (None, known) else Fit.OLDER
