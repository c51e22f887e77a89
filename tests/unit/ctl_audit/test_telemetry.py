from __future__ import annotations

from garrison_controller.telemetry import queries, rules
from garrison_protocol.states import Stream
from garrison_protocol.topics import Up
from tests.unit.rollouts.fleet import START, Fleet


def test_samples_come_back_with_their_facts_the_newest_last(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    for number in range(6):
        board.measure(requests=number, online=number < 3, tps_milli=1000 * number, loaded="smol")
    fleet.send(board, Up.TELEMETRY, board.batch(stream=Stream.TELEMETRY))
    with fleet.database.reading() as session:
        newest = queries.samples(session, "edge-1", since_ms=None, limit=2)
        since = int(START.timestamp() * 1000) + 60_000
        later = queries.samples(session, "edge-1", since_ms=since, limit=100)
    assert [one["seq"] for one in newest] == [5, 6]
    assert [one["seq"] for one in later] == [2, 3, 4, 5, 6]
    assert newest[-1] == {
        "epoch": board.epoch,
        "seq": 6,
        "time_ms": int(START.timestamp() * 1000) + 300_000,
        "requests": 5,
        "online": False,
        "tps_milli": 5000,
        "loaded": "smol",
    }
    summary = rules.summary(later)
    assert (summary["rows"], summary["offline"], summary["requests"]) == (5, 3, 15)
    assert summary["tps_milli_median"] == 3000


def test_a_board_cannot_break_the_summary_with_odd_values() -> None:
    odd = rules.sample("e", 1, 5, {"d": "x", "requests": "many", "errors": True, "cpu_permille": 1.5, "seq": 9})
    assert odd == {"epoch": "e", "seq": 1, "time_ms": 5, "requests": "many", "errors": True}
    summary = rules.summary([odd])
    assert (summary["requests"], summary["errors"], summary["cpu_permille_peak"]) == (0, 0, None)
    assert rules.summary([])["rows"] == 0


def test_text_that_no_answer_can_hold_is_replaced() -> None:
    odd = rules.sample("e", 1, 5, {"lo\ud800": "smol\udfff"})
    assert odd == {"epoch": "e", "seq": 1, "time_ms": 5, "lo?": "smol?"}
