"""How a board's trust is shown: ``core.trust_report``'s facts as ``status`` has them, and as ``doctor`` has them."""

from __future__ import annotations

from garrison_agent.api.commands import Check, KeyView, LeaseView, TrustView
from garrison_agent.core import trust_report
from garrison_agent.core.trust_report import TrustFacts


def trust_view(facts: TrustFacts) -> TrustView:
    """Return what ``facts`` come to."""
    return TrustView(
        clock=int(facts.clock_s),
        floor=int(facts.floor_s),
        floor_source=trust_report.floor_source(facts),
        judged_at=int(facts.now_s),
        anchored=facts.anchored,
        fresh_at=int(facts.fresh_at_s),
        ends=dict(facts.ends),
        keys=[
            KeyView(
                purpose=key.purpose.value,
                fingerprint=trust_report.fingerprint(key),
                not_before=int(key.not_before.timestamp()),
                not_after=int(key.not_after.timestamp()),
                ended=key.not_after.timestamp() < facts.now_s,
            )
            for key in trust_report.keys(facts)
        ],
        leases=[
            LeaseView(
                alias=alias,
                model=model,
                ends_at=int(standing.ends_at_s),
                on_expiry=standing.lease.on_expiry,
                ended=standing.ended,
            )
            for alias, (model, standing) in sorted(facts.leases.items())
        ],
        trusts=list(trust_report.trusted(facts)),
        refuses=list(trust_report.refused(facts)),
    )


def trust_checks(view: TrustView) -> list[Check]:
    """Return ``view`` as findings of ``doctor``: a board that refuses something says why."""
    trusts = [Check(name="trusts", outcome="ok", detail=sentence, fix="") for sentence in view["trusts"]]
    refuses = [
        Check(name="refuses", outcome="warn", detail=sentence, fix="connect the board to its controller")
        for sentence in view["refuses"]
    ]
    nothing = "nothing that is signed, newer, and meant for this board"
    return trusts + (refuses or [Check(name="refuses", outcome="ok", detail=nothing, fix="")])
