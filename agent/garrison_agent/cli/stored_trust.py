"""What the store says of trust and time, for ``doctor`` while the agent is down. Reads only."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from pathlib import Path

from garrison_agent.api.commands import TrustView
from garrison_agent.api.trust_view import trust_view
from garrison_agent.core.time_floor import TimeFloor
from garrison_agent.core.trust_report import ROLES, TrustFacts
from garrison_protocol.errors import GarrisonError
from garrison_protocol.fleet import parse_fleet
from garrison_protocol.states import Freshness

READ_TIMEOUT_S = 2.0


def read_trust(database: Path, clock_s: float) -> TrustView | None:
    """Return the view of a board whose agent is down, or None where the store is missing or cannot be read.

    Leases are left out: whether a model serves is for the running agent to say.
    """
    if not database.is_file():
        return None
    try:
        with contextlib.closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=READ_TIMEOUT_S)
        ) as store:
            meta = {str(key): str(value) for key, value in store.execute("SELECT key, value FROM meta")}
        return trust_view(_facts(meta, clock_s))
    except (sqlite3.Error, GarrisonError, ValueError, TypeError, KeyError, AttributeError):
        return None  # the agent says what is wrong with it when it starts


def _facts(meta: dict[str, str], clock_s: float) -> TrustFacts:
    monotonic_s = time.monotonic()
    floor = TimeFloor.start(json.loads(meta.get("time.floor", "{}")), monotonic_s)
    kept = json.loads(meta.get("registry.kept", "{}"))
    lowest = json.loads(meta.get("desired.anchor") or "{}").get("counter")
    ends = {str(role): int(end) for role, end in kept.get("expires", {}).items()}
    now_s = max(clock_s, floor.at_s(monotonic_s))
    fresh = ends.keys() >= ROLES and now_s <= min(ends[role] for role in ROLES)
    return TrustFacts(
        freshness=(Freshness.FRESH if fresh else Freshness.STALE) if kept else Freshness.NONE,
        root=int(kept.get("root", 0)),
        fresh_at_s=float(kept.get("refreshed_at", 0)),
        ends=ends,
        fleet=parse_fleet(meta["registry.fleet"].encode()) if "registry.fleet" in meta else None,
        clock_s=clock_s,
        floor_s=floor.at_s(monotonic_s),
        signer=floor.source,
        anchored=False,
        applied=int(meta.get("desired.counter", 0)),
        lowest=lowest,
    )
