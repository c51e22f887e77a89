from __future__ import annotations

import re

from garrison_agent.core.exposition import Family, Sample, gauge, histograms, render
from garrison_agent.core.meters import (
    DURATION,
    INSTRUMENTS,
    LATENCY,
    MAX_SERIES,
    OTHER,
    PACE,
    USAGE,
    Meters,
)
from garrison_agent.runtimes.status import RequestRecord

CHAT = RequestRecord("chat", True, None, 100, 20, 45.0, 600.0, 40.0)
LINE = re.compile(r'[a-z_]+\{([a-z_]+="([^"\\\n]|\\[\\n"])*"(,|(?=\})))*\} (\+Inf|-?[0-9.e+-]+)')


def counts(meters: Meters, name: str) -> dict[int, int]:
    """Return the filled buckets of all series of one instrument."""
    (found,) = [histogram for (one, _), histogram in meters.series.items() if one == name]
    return {place: count for place, count in enumerate(found.counts) if count}


def test_boundaries_are_opentelemetrys() -> None:
    assert INSTRUMENTS[USAGE].bounds[:4] == (1, 4, 16, 64)
    assert INSTRUMENTS[USAGE].bounds[-1] == 67_108_864
    assert INSTRUMENTS[DURATION].bounds[0] == 0.01
    assert INSTRUMENTS[DURATION].bounds[-1] == 81.92
    assert len(INSTRUMENTS[LATENCY].bounds) == 16
    assert len(INSTRUMENTS[PACE].bounds) == 13
    assert all(list(one.bounds) == sorted(set(one.bounds)) for one in INSTRUMENTS.values())


def test_a_request_is_counted_once_in_each_histogram() -> None:
    meters = Meters()
    meters.add("smol", CHAT)
    assert counts(meters, LATENCY) == {5: 1}  # 0.045 s: above 0.04, at most 0.06
    assert counts(meters, PACE) == {1: 1}  # 0.025 s is within its bound
    assert counts(meters, DURATION) == {6: 1}
    usage = {
        dict(labels)["gen_ai.token.type"]: one.sum for (name, labels), one in meters.series.items() if name == USAGE
    }
    assert usage == {"input": 100, "output": 20}


def test_failures_are_told_apart_and_measure_no_speed() -> None:
    meters = Meters()
    meters.add("smol", RequestRecord("chat", False, "inference.queue_full", duration_ms=1.0, status=503))
    ((name, labels),) = meters.series
    assert (name, dict(labels)["error.type"]) == (DURATION, "inference.queue_full")


def test_a_flood_of_names_takes_no_memory() -> None:
    meters = Meters()
    for number in range(2 * MAX_SERIES):
        meters.add(f"model{number}", CHAT)
    assert len(meters.series) <= MAX_SERIES + 2 * len(INSTRUMENTS)
    total = sum(sum(one.counts) for (name, _), one in meters.series.items() if name == DURATION)
    assert total == 2 * MAX_SERIES
    assert any(dict(labels)["gen_ai.request.model"] == OTHER for _, labels in meters.series)


def test_windows_add_up() -> None:
    whole, window = Meters(), Meters()
    for _ in range(3):
        window.add("smol", CHAT)
    whole.merge(window)
    whole.merge(window)
    assert counts(whole, DURATION) == {6: 6}
    assert counts(window, DURATION) == {6: 3}


def test_a_telemetry_row_is_short_and_holds_integers() -> None:
    meters = Meters()
    meters.add("smol", CHAT)
    meters.add("smol", RequestRecord("chat", False, "inference.failed", duration_ms=5.0, status=500))
    meters.add("other", RequestRecord("infer", True, duration_ms=2.0))
    other, smol = meters.rows()
    assert (other["model"], other["operation"], other["not_answered"]) == ("other", "infer", 0)
    assert smol == {
        "model": "smol",
        "operation": "chat",
        "not_answered": 1,
        DURATION: "1 0 0 0 0 0 1",
        f"{DURATION}.sum": 605_000,
        LATENCY: "0 0 0 0 0 1",
        f"{LATENCY}.sum": 45_000,
        PACE: "0 1",
        f"{PACE}.sum": 25_000,
        f"{USAGE}.input": "0 0 0 0 1",
        f"{USAGE}.input.sum": 100,
        f"{USAGE}.output": "0 0 0 1",
        f"{USAGE}.output.sum": 20,
    }


def test_the_page_is_what_prometheus_reads() -> None:
    meters = Meters()
    meters.add('sm"o\\l\n', CHAT)
    page = render([gauge("up", "A\nhelp", 0.5), Family("none", "gauge", "left out", ()), *histograms(meters)])
    lines = page.splitlines()
    assert page.endswith("\n")
    assert lines[:3] == ["# HELP up A\\nhelp", "# TYPE up gauge", "up{} 0.5"]
    assert "none" not in page
    for line in lines:
        assert line.startswith(("# HELP ", "# TYPE ")) or LINE.fullmatch(line), line
    labels = r'gen_ai_request_model="sm\"o\\l\n",gen_ai_operation_name="chat"'
    name = "gen_ai_server_time_to_first_token_seconds"
    assert f"# TYPE {name} histogram" in lines
    assert f'{name}_bucket{{{labels},le="0.04"}} 0' in lines
    assert f'{name}_bucket{{{labels},le="0.06"}} 1' in lines
    assert f'{name}_bucket{{{labels},le="+Inf"}} 1' in lines  # buckets are summed up
    assert f"{name}_sum{{{labels}}} 0.045" in lines
    assert f"{name}_count{{{labels}}} 1" in lines
    assert f'gen_ai_client_token_usage_sum{{{labels},gen_ai_token_type="output"}} 20' in lines


def test_samples_of_other_models_are_left_out() -> None:
    family = Family("f", "gauge", "", (Sample({"gen_ai_request_model": "a"}, 1), Sample({"x": "b"}, 2)))
    assert [one.value for one in family.only({"b"}.__contains__).samples] == [2]
    assert family.only({"a"}.__contains__) == family
