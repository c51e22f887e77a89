"""The small decisions: which desired state counts, what fits into memory, how long to wait, what requests add up to."""

from __future__ import annotations

import pytest

from garrison_agent.core import health, retry
from garrison_agent.core.desired import Applied, Verdict, judge, reconcile
from garrison_agent.core.draft import Draft
from garrison_agent.core.residency import Placement, Resident, place
from garrison_agent.core.slot import Assign, Withdraw
from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol.canonical import canonical_json
from garrison_protocol.messages.desired import Desired
from garrison_protocol.states import DeploymentState as State
from tests.unit.core.slots import entry, slot_in


@pytest.mark.parametrize(
    ("counter", "digest", "verdict"),
    [
        (6, "b", Verdict.ACCEPT),
        (5, "a", Verdict.REPEATED),
        (5, "b", Verdict.CONFLICT),
        (4, "a", Verdict.OLDER),
        (1, "b", Verdict.OLDER),
    ],
)
def test_only_a_higher_counter_is_accepted(counter: int, digest: str, verdict: Verdict) -> None:
    assert judge(Applied(5, "a"), counter, digest, None) is verdict


@pytest.mark.parametrize(
    ("applied", "lowest", "verdict"),
    [
        (0, None, Verdict.HOLD),
        (0, 0, Verdict.ACCEPT),
        (0, 6, Verdict.ACCEPT),
        (0, 7, Verdict.BELOW_ANCHOR),
        (5, 7, Verdict.BELOW_ANCHOR),
        (5, None, Verdict.ACCEPT),
        (6, 9, Verdict.REPEATED),
    ],
)
def test_an_anchor_says_how_far_a_board_had_been(applied: int, lowest: int | None, verdict: Verdict) -> None:
    assert judge(Applied(applied, "b"), 6, "b", lowest) is verdict


def test_reconcile_names_every_alias_that_is_or_was_wanted() -> None:
    gone = slot_in(State.ACTIVE)
    removed = slot_in(State.REMOVED)
    wanted = entry().model_copy(update={"alias": "new"})
    desired = Desired(device="edge-1", counter=1, aliases=(wanted,))
    assert reconcile({"chat": gone, "old": removed}, desired) == {"chat": Withdraw(), "new": Assign(wanted)}


@pytest.mark.parametrize(
    ("needed", "loaded", "placement"),
    [
        (400, [], Placement.BESIDE),
        (400, [Resident("chat", 600)], Placement.BESIDE),
        (401, [Resident("chat", 600)], Placement.INSTEAD),
        (401, [Resident("other", 600)], Placement.BUSY),
        (500, [Resident("chat", 300), Resident("other", 500)], Placement.INSTEAD),
        (501, [Resident("chat", 300), Resident("other", 500)], Placement.BUSY),
        (1001, [], Placement.NEVER),
    ],
)
def test_placement(needed: int, loaded: list[Resident], placement: Placement) -> None:
    assert place("chat", needed, 1000, loaded) is placement


def test_waits_double_up_to_their_cap() -> None:
    backoff = retry.Backoff(base_s=1, cap_s=10)
    assert [backoff.delay_s(tries) for tries in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 8, 10, 10]
    assert (retry.jittered(10, 0.0), retry.jittered(10, 0.5)) == (5.0, 7.5)


def test_what_others_write_fits_into_an_audit_entry() -> None:
    draft = Draft(slot_in(State.ACTIVE))
    draft.note("model.load_failed", None, code="x", detail="y" * 1_000_000)
    (record,) = draft.done().records
    assert len(canonical_json(record.facts)) < 2000


def test_requests_add_up_in_integers() -> None:
    records = [
        RequestRecord("chat", True, None, 10, 5, 20.4, 100.0, 30.5),
        RequestRecord("chat", True, None, 10, 5, 40.6, 100.0, 10.5),
        RequestRecord("chat", False, health.CLIENT_GONE, 3),
        RequestRecord("infer", False, "inference.failed", status=500),
    ]
    facts = health.summarize(records)
    assert facts == {
        "requests": 4,
        "errors": 1,
        "prompt_tokens": 23,
        "completion_tokens": 10,
        "ttft_ms_p50": 30,
        "ttft_ms_max": 41,
        "tps_milli": 20500,
    }
    canonical_json([facts, *(health.row("chat", "chat:1", record) for record in records)])
    assert health.summarize([]) == {"requests": 0, "errors": 0, "prompt_tokens": 0, "completion_tokens": 0}
