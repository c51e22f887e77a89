from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.adapters.sensors import Throttling
from garrison_agent.cli import bench, bench_history
from garrison_agent.cli.bench import _reasons, cpu_name, render
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.main import main
from garrison_agent.cli.measuring import Row


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def record(rate: float, **changes: object) -> dict[str, Any]:
    return {
        "test_time": "2026-11-24T08:00:00Z",
        "cpu_info": "Cortex-A76",
        "model": "smollm2:1.0.0",
        "alias": "chat",
        "variant": "cpu-q4",
        "model_type": "Q4_1",
        "rss_bytes": 300 * 2**20,
        "temperature_c": [50.0, 61.5],
        "throttled": [],
        "test": "tg128",
        "unit": "tok/s",
        "avg_ts": rate,
        "stddev_ts": 0.5,
        **changes,
    }


def test_a_row_has_the_fields_of_llama_bench() -> None:
    row = Row("tg8", "tok/s", 0, 8, 1, samples_ns=[100, 200, 300], samples_ts=[10.0, 20.0, 30.0])
    fields = row.to_dict()
    assert (fields["avg_ns"], fields["stddev_ns"]) == (200, 100)  # of a sample, as llama-bench computes it
    assert (fields["avg_ts"], fields["stddev_ts"]) == (20.0, 10.0)
    assert "latency_ms_p50" not in fields
    one = Row("infer", "req/s", 0, 100, 1, [5], [1.0], latencies_ms=[float(value) for value in range(1, 101)]).to_dict()
    assert (one["stddev_ns"], one["latency_ms_p50"], one["latency_ms_p95"]) == (0, 50.5, 95.0)


def test_a_change_is_against_the_newest_of_the_same_kind() -> None:
    earlier = [record(5), record(10), record(99, test="pp512"), record(99, cpu_info="other"), record(99, variant="f16")]
    assert bench_history.change(record(11), earlier) == pytest.approx(10)
    assert bench_history.change(record(11, test="tg64"), earlier) is None


def test_a_run_is_shown_with_its_change() -> None:
    text = render([record(9)], [record(10)])
    assert "9.00 ± 0.50" in text
    assert "-10.0 %" in text
    assert "62 °C, 50 °C before" in text
    assert "throttled    no" in text
    text = render([record(9, throttled=None, temperature_c=[None, None])], [])
    assert "the board does not say" in text
    assert "no sensor" in text


def test_history_survives_what_is_not_its_own(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_history.append([record(10), record(100, test="pp512")])
    with bench_history.history_path().open("a") as file:
        file.write('not json\n{"model": 1}\n[1]\n{"avg_ts": "x"}\n')
    bench_history.append([record(12), record(5, alias="other", model="other:1")])
    assert state in bench_history.history_path().parents
    assert main(["bench", "--history", "chat"]) == 0
    out = capsys.readouterr().out
    assert "other" not in out
    assert "+20.0 %" in out
    assert main(["bench", "--history", "smollm2", "-o", "json"]) == 0
    assert [one["avg_ts"] for one in json.loads(capsys.readouterr().out)] == [10, 100, 12]


def test_no_history_and_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--history"]) == 0
    assert "nothing was measured yet" in capsys.readouterr().out
    assert main(["bench"]) == 2


def test_what_was_measured_is_shown_even_if_it_cannot_be_kept(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    view = {"alias": "chat", "id": "smollm2:1.0.0", "variant": "cpu-q4", "quantization": "Q4_1", "engine": "llama.cpp"}
    answers = {"models": {**view, "file_size_mb": 3.0, "parameter_count": 0}, "loaded": []}
    monkeypatch.setattr(AgentClient, "get", lambda self, *path: answers[path[0]])
    monkeypatch.setattr(bench, "load_and_wait", lambda client, name: None)
    monkeypatch.setattr(bench, "measure_text", lambda *_, **__: [Row("tg8", "tok/s", 0, 8, 1, [100], [12.5])])
    (state / "garrison" / "bench.jsonl").mkdir(parents=True)  # no file can be there
    assert main(["bench", "chat"]) == 2
    assert "12.50" not in capsys.readouterr().out  # said before anything is measured
    (state / "garrison" / "bench.jsonl").rmdir()
    (state / "garrison").rmdir()
    (state / "garrison").symlink_to(state / "gone" / "folder")  # nothing to read, and no place to write to
    assert main(["bench", "chat"]) == 2
    assert "12.50" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["-r", "0"], ["-p", "-1"], ["--concurrent", "0"], ["-n", "x"]])
def test_numbers_that_make_no_sense(words: list[str]) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["bench", "chat", *words])
    assert wrong.value.code == 2


def test_reasons_for_being_slow_are_those_of_the_run() -> None:
    before = Throttling(since_start=("under-voltage",), count=3)
    assert _reasons(before, before) == []
    after = Throttling(now=("throttled",), since_start=("under-voltage", "frequency capped"), count=4)
    assert _reasons(before, after) == ["frequency capped", "throttled", "cores slowed for heat"]


def test_what_a_processor_is_called(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Fast One\nprocessor\t: 1\nmodel name\t: Fast One\n")
    assert cpu_name(path) == "Fast One"
    path.write_text("processor\t: 0\nBogoMIPS\t: 108\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n")
    assert cpu_name(path) == "Raspberry Pi 5 Model B Rev 1.0"
    assert cpu_name(tmp_path / "none")
