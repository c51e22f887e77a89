from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from garrison_agent.api.commands import StatusView
from garrison_agent.cli.main import main
from garrison_agent.cli.status import render
from tests.unit.agent_cli.conftest import Serve


def make_status(**changes: Any) -> StatusView:
    view: dict[str, Any] = {
        "device": "edge-1",
        "version": "0.1.0",
        "started_at": 1_700_000_000,
        "pid": 42,
        "connected": True,
        "broker_error": "",
        "broker": "broker.example:8883",
        "certificate": {
            "not_before": 1_700_000_000,
            "not_after": 1_702_592_000,
            "renew_at": 1_701_728_000,
            "ended": False,
            "failed": 0,
            "error_code": None,
            "error_message": None,
        },
        "registry": {"freshness": "FRESH", "root": 1, "timestamp": 4, "snapshot": 3, "targets": 2},
        "trust": {
            "clock": 1_700_000_000,
            "floor": 1_699_990_000,
            "floor_source": "an anchor",
            "judged_at": 1_700_000_000,
            "anchored": True,
            "fresh_at": 1_699_990_000,
            "ends": {"timestamp": 1_700_500_000},
            "keys": [],
            "leases": [
                {
                    "alias": "chat",
                    "model": "smollm2:1.0.0",
                    "ends_at": 1_700_090_000,
                    "on_expiry": "stop",
                    "ended": False,
                }
            ],
            "trusts": [],
            "refuses": [],
        },
        "desired": {"counter": 5, "sha256": "ab" * 32},
        "aliases": [
            {
                "alias": "chat",
                "package": "smollm2:2.0.0",
                "version": "2.0.0",
                "state": "DOWNLOADING",
                "loaded": True,
                "serving": "smollm2:1.0.0",
                "serving_since": 1_700_000_100,
                "rollout": "r-1",
                "variant": "cpu-q4",
                "error_code": None,
                "error_message": None,
                "progress_bytes": 50 * 1024 * 1024,
                "total_bytes": 100 * 1024 * 1024,
                "endpoint": "/v1",
                "worker": "ready",
                "worker_failure": None,
                "memory_mb": 310,
                "load_ms": 480,
            }
        ],
        "outbox": {
            "telemetry": {"epoch": "cd" * 8, "last": 120, "acked": 100, "pending": 20},
            "audit": {"epoch": "ab" * 8, "last": 7, "acked": 7, "pending": 0},
        },
        "health": {"rss_mb": 52, "mem_used_mb": 812, "mem_total_mb": 3904},
        "refused": {"envelope.bad_signature": 2},
        "cache": {"used_mb": 120, "free_mb": 8123},
    }
    view.update(changes)
    return cast(StatusView, view)


def test_everything_that_matters_is_shown() -> None:
    text = render(make_status(), 1_700_000_000 + 11_520)
    for part in (
        "edge-1",
        "0.1.0, pid 42, up 3 h 12 min",
        "broker.example:8883, connected",
        "2023-11-14 22:13 UTC, told by the controller since the start; not before 2023-11-14 19:26 UTC",
        "smollm2:1.0.0  2023-11-15 23:13 UTC  stop",
        "nothing that is signed, newer, and meant for this board",
        "FRESH (root 1, timestamp 4, snapshot 3, targets 2)",
        "counter 5, sha256 abababababab...",
        "agent 52 MiB, board 812 of 3904 MiB used",
        "models 120 MiB, free 8123 MiB",
        "envelope.bad_signature 2",
        "smollm2:2.0.0",
        "DOWNLOADING 50 % of 100 MiB",
        "smollm2:1.0.0",
        "2023-11-1",
        "until 2023-12-14",
        "renewed from 2023-12-04",
    ):
        assert part in text
    rows = [line.split() for line in text.splitlines()]
    assert ["audit", "ab" * 8, "7", "7", "0"] in rows
    assert ["telemetry", "cd" * 8, "120", "100", "20"] in rows


def test_a_new_board_says_what_is_missing() -> None:
    view = make_status(
        broker="",
        connected=False,
        aliases=[],
        health={},
        refused={},
        desired={"counter": 0, "sha256": None},
    )
    text = render(view, 1_700_000_000)
    assert "garrison-agent enroll" in text
    assert "no models are assigned" in text
    assert "not measured yet" in text


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"not_after": None, "renew_at": None, "ended": True}, "none that can be used"),
        ({"ended": True}, "expired on 2023-12-14"),
        ({"renew_at": 1_600_000_000}, "renewal is due"),
        (
            {"failed": 3, "error_code": "renewal.grace_over", "error_message": "too late"},
            "3 tries failed: too late (renewal.grace_over)",
        ),
    ],
)
def test_a_certificate_that_wants_attention(change: dict[str, Any], part: str) -> None:
    certificate = cast(Any, {**make_status()["certificate"], **change})
    assert part in render(make_status(certificate=certificate), 1_700_000_000)


def test_failures_are_explained_below() -> None:
    alias = {**make_status()["aliases"][0], "state": "ROLLED_BACK", "error_code": "gate.accuracy"}
    alias["error_message"] = "2 of 8 cases passed"
    text = render(make_status(aliases=[alias], broker="b:1", connected=False), 0)
    assert text.endswith("chat: 2 of 8 cases passed (gate.accuracy)")
    assert "b:1, not connected\n" in text
    text = render(make_status(broker="b:1", connected=False, broker_error="connection refused"), 0)
    assert "b:1, not connected: connection refused\n" in text


def test_upstreams_are_shown_as_not_verified() -> None:
    big = {"alias": "big", "url": "http://127.0.0.1:8000/v1", "model": "theirs", "state": "unreachable", "detail": "no"}
    assert "NOT VERIFIED" not in render(make_status(), 0)
    text = render(make_status(upstreams=[big]), 0)
    assert "UPSTREAM, NOT VERIFIED" in text
    assert "http://127.0.0.1:8000/v1  unreachable  no" in text


def test_the_command_prints_both_forms(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(lambda command: make_status())
    assert main(["--config", str(config), "status"]) == 0
    assert "ALIAS" in capsys.readouterr().out
    assert main(["status", "-o", "json", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out) == make_status()
