import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_protocol import chain

DEVICE, EPOCH = "edge-1", "0123456789abcdef"
SALT = bytes(range(16))


def build(count: int) -> list[chain.Entry]:
    entries: list[chain.Entry] = []
    previous = chain.genesis(DEVICE, "audit", EPOCH)
    for seq in range(1, count + 1):
        entry = chain.build(
            device=DEVICE,
            epoch=EPOCH,
            seq=seq,
            time_ms=1000 + seq,
            kind="model.loaded",
            previous=previous,
            facts={"model": f"m:{seq}"},
            body={"seq": seq, "note": "grüße"},
            salt=SALT,
        )
        entries.append(entry)
        previous = entry.hash
    return entries


def first_fault(entries: list[chain.Entry]) -> int | None:
    previous = chain.genesis(DEVICE, "audit", EPOCH)
    for seq, entry in enumerate(entries, 1):
        if chain.check(entry, device=DEVICE, epoch=EPOCH, seq=seq, previous=previous) is not None:
            return seq
        previous = entry.hash
    return None


def test_an_untouched_chain_holds() -> None:
    assert first_fault(build(20)) is None


@given(st.integers(1, 10), st.sampled_from(["header", "body", "salt", "hash"]))
def test_any_altered_part_is_found_at_its_entry(victim: int, part: str) -> None:
    entries = build(10)
    entry = entries[victim - 1]
    altered = {
        "header": entry.header.replace("model.loaded", "model.ignore"),
        "body": '{"note":"other","seq":1}',
        "salt": "00" * 16,
        "hash": "0" * 64,
    }[part]
    entries[victim - 1] = chain.Entry(**{**dataclasses.asdict(entry), part: altered})
    assert first_fault(entries) == victim


def test_rewriting_an_entry_with_a_fitting_hash_breaks_the_next_link() -> None:
    entries = build(5)
    header = entries[2].header.replace("m:3", "m:9")
    entries[2] = dataclasses.replace(entries[2], header=header, hash=chain.header_hash(header))
    assert first_fault(entries) == 4


@pytest.mark.parametrize("change", ["drop", "swap", "repeat"])
def test_missing_swapped_and_repeated_entries_are_found(change: str) -> None:
    entries = build(6)
    if change == "drop":
        del entries[2]
    elif change == "swap":
        entries[2], entries[3] = entries[3], entries[2]
    else:
        entries.insert(2, entries[2])
    assert first_fault(entries) is not None


def test_an_erased_body_leaves_the_chain_whole() -> None:
    entries = build(4)
    entries[1] = dataclasses.replace(entries[1], body=None, salt=None)
    assert first_fault(entries) is None


def test_another_board_or_epoch_is_refused() -> None:
    entry = build(1)[0]
    previous = chain.genesis(DEVICE, "audit", EPOCH)
    assert chain.check(entry, device="edge-2", epoch=EPOCH, seq=1, previous=previous) is not None
    assert chain.check(entry, device=DEVICE, epoch="f" * 16, seq=1, previous=previous) is not None


def test_facts_may_not_pose_as_the_header() -> None:
    with pytest.raises(ValueError, match="one-letter"):
        chain.build(device=DEVICE, epoch=EPOCH, seq=1, time_ms=0, kind="x", previous=None, facts={"p": "0"})


def test_headers_are_canonical() -> None:
    header = build(1)[0].header
    assert header == json.dumps(json.loads(header), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("header", ["", "[]", "[" * 100_000, '"x"', "{}"])
def test_a_header_of_another_form_is_refused(header: str) -> None:
    entry = chain.Entry(1, chain.header_hash(header), header)
    assert chain.check(entry, device=DEVICE, epoch=EPOCH, seq=1, previous=None) is not None
