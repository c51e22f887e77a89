"""A board that was away for 240 days: it serves all the time, and is at home again after one refresh.

Its store, trust, and downloads are the real ones, its registry is served over HTTPS. Only its clock is the test's, and
the models are processes in name only: whether one serves is told by the routes that requests would take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from garrison_agent.api.commands import Doctor, GetStatus
from garrison_agent.events import Tick
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from tests.attacks.target import RegistryWork, Target
from tests.fakes.registry_server import serve
from tests.fakes.tuf_repository import FakeRepository, in_days
from tests.unit.loop.rig import entry, package

DAY_S = 86_400.0
AWAY_DAYS = 240


def serving(board: Target) -> list[str]:
    """Return the models that a request would reach now."""
    return [model for _, model, socket in board.served if socket is not None]


def rotate_four_times(repository: FakeRepository) -> None:
    """Replace keys of root, timestamp, and snapshot while the board is away; two of the roots have ended by now."""
    repository.expires["root"] = in_days(-1)
    repository.rotate("root")
    repository.rotate("timestamp")
    repository.expires["root"] = in_days(AWAY_DAYS + 365)
    repository.rotate("root")
    repository.rotate("snapshot")
    repository.expires |= {
        "targets": in_days(AWAY_DAYS + 365),
        "snapshot": in_days(AWAY_DAYS + 30),
        "timestamp": in_days(AWAY_DAYS + 7),
    }


@pytest.mark.parametrize("clock_works", [True, False], ids=["clock", "no clock"])
def test_240_days_four_root_rotations_and_a_restart(tmp_path: Path, *, clock_works: bool) -> None:
    board = Target(tmp_path / "board")
    board.repository.expires |= {"root": in_days(200), "targets": in_days(200)}
    board.repository.publish_root()
    board.repository.publish()
    board.settle()
    board.connect()
    board.deploy(package("1.0"), "r1")
    home_s, root = board.clock.wall_s, board.parts.trust.view.root

    board.disconnect()
    board.controller_silent = True
    published = dict(board.content)
    board.content.clear()  # nobody answers any more
    for day in range(AWAY_DAYS):
        board.clock.forward(DAY_S)
        board.owner.handle(Tick.HEARTBEAT)
        board.owner.handle(Tick.THIN)
        if day % 30 == 0:
            board.look()
        assert serving(board) == ["chat:1.0"]
    assert board.parts.trust.view.freshness == "STALE"
    assert all(end < board.parts.timekeeper.now_s() for end in board.parts.trust.expires.values())

    if not clock_works:
        board.clock.wall_s = 0.0
    board.restart()
    assert serving(board) == ["chat:1.0"]
    assert board.parts.timekeeper.now_s() == pytest.approx(home_s + AWAY_DAYS * DAY_S, abs=700)
    assert board.ask(GetStatus()).result(0)["trust"]["refuses"][0].startswith("New models: ")  # type: ignore[index]

    rotate_four_times(board.repository)
    board.repository.add(package("2.0"))
    board.repository.set_fleet()
    board.repository.publish()
    # A controller keeps every root for ever.
    board.content.update({name: data for name, data in published.items() if name.endswith(".root.json")})
    with serve(board.repository.content, tmp_path / "server") as server:
        assert isinstance(board.work, RegistryWork)
        board.work.source = HttpSource(HttpsOpener(server.url, server.ca_path))
        board.controller_silent = False
        board.answer_with = {"time_s": home_s + AWAY_DAYS * DAY_S}
        board.connect()
        assert board.parts.trust.view.freshness == "FRESH"
        assert board.parts.trust.view.root == root + 4
        board.desire(entry(package("2.0").ref, "r2"))
        board.forward(60)
    assert serving(board) == ["chat:2.0"]
    assert board.refused == {}
    checks: Any = board.ask(Doctor()).result(0)
    assert [one["outcome"] for one in checks if one["name"] == "refuses"] == ["ok"]
    board.database.close()
