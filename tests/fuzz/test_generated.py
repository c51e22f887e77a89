"""Generated input for every reader: refused with a stable code, within bounds of memory, or read."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.fuzz.entries import ENTRIES, READ, recorded
from tests.fuzz.profile import FAST, SLOW, bounded_memory
from tests.fuzz.seeds import MUST_REFUSE, ODD, WORST, near, odd_everywhere, resigned, resigned_everywhere, seeds

ON_DISK = {"metadata", "resigned", "cache", "board", "controller"}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_takes_its_honest_inputs(name: str) -> None:
    taken = []
    for place, data in enumerate(seeds()[name]):
        with recorded() as outcomes:
            ENTRIES[name](data)
        if (name, place) in MUST_REFUSE:
            assert outcomes == [MUST_REFUSE[name, place]]
        else:
            assert READ in outcomes, (place, outcomes)
            taken.append(outcomes)
    for block, outcomes_of_block in enumerate(zip(*taken, strict=True)):
        assert READ in outcomes_of_block, f"block {block} takes no honest input"


@pytest.mark.parametrize("name", ENTRIES)
def test_every_value_may_be_odd(name: str) -> None:
    # A signature or a digest refuses any change of ``metadata``: leaving values out is odd enough there.
    values = () if name == "metadata" else WORST if name in ON_DISK else ODD
    inputs = (odd for honest in seeds()[name] for odd in odd_everywhere(honest, values))
    with bounded_memory():
        for data in resigned_everywhere() if name == "resigned" else inputs:
            ENTRIES[name](data)


@pytest.mark.parametrize("name", ENTRIES)
def test_near_honest_input_is_read_or_refused(name: str) -> None:
    inputs = resigned() if name == "resigned" else near(name)

    @(SLOW if name in ON_DISK else FAST)
    @given(inputs)
    def check(data: bytes) -> None:
        ENTRIES[name](data)

    with bounded_memory():
        check()
