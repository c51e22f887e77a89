"""Whether a store is the one that the controller knows."""

from __future__ import annotations

import pytest

from garrison_agent.core.recovery import Fit, compare
from garrison_protocol.messages.anchor import Committed
from garrison_protocol.messages.report import Head

OURS, OTHER = "a" * 16, "b" * 16
HASHES = {8: "8" * 64, 9: "9" * 64}


def head(acked: int = 5) -> Head:
    return Head(epoch=OURS, seq=9, hash=HASHES[9], acked=acked)


@pytest.mark.parametrize(
    ("theirs", "fit"),
    [
        (None, Fit.SAME),
        (Committed(epoch=OURS, seq=0), Fit.SAME),
        (Committed(epoch=OURS, seq=8, hash=HASHES[8]), Fit.SAME),
        (Committed(epoch=OURS, seq=9, hash=HASHES[9]), Fit.SAME),
        (Committed(epoch=OURS, seq=7, hash="7" * 64), Fit.SAME),  # thinned here: nothing is left to compare
        (Committed(epoch=OURS, seq=8, hash="0" * 64), Fit.OLDER),
        (Committed(epoch=OURS, seq=10, hash="0" * 64), Fit.OLDER),
        (Committed(epoch=OTHER, seq=1, hash="0" * 64), Fit.OLDER),
    ],
)
def test_what_the_controllers_newest_row_says(theirs: Committed | None, fit: Fit) -> None:
    assert compare(head(), theirs, HASHES.get, ()) is fit


def test_a_store_that_never_had_a_receipt_replaces_one_that_was_lost() -> None:
    assert compare(head(acked=0), Committed(epoch=OTHER, seq=40, hash="0" * 64), HASHES.get, ()) is Fit.NEW


def test_a_controller_that_was_put_back_is_not_obeyed() -> None:
    assert compare(head(), Committed(epoch=OTHER, seq=40, hash="0" * 64), HASHES.get, (OTHER,)) is Fit.SAME
