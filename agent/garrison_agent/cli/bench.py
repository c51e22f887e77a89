"""``garrison-agent bench``: how fast a model is on this board, what it takes, and how that was before."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from garrison_agent.adapters.sensors import Throttling, read_sample, read_throttling
from garrison_agent.api.commands import LoadedView, ModelView
from garrison_agent.cli import bench_history
from garrison_agent.cli.bench_history import Record, change
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.measuring import TENSOR_REQUESTS, Row, measure_tensors, measure_text
from garrison_agent.cli.models import load_and_wait
from garrison_agent.cli.output import pairs, print_json, size, table
from garrison_agent.cli.progress import Spinner
from garrison_agent.config import load_config
from garrison_protocol.errors import InvalidError
from garrison_protocol.manifest import Manifest
from garrison_protocol.states import Engine

_GENERATE = 128
_TENSORS_AT_ONCE = 8


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure a model and keep the result, or show what was kept."""
    if arguments.history:
        return _show_history(arguments)
    if arguments.name is None:
        raise InvalidError("cli.model_missing", "bench needs the name of a model", hint="garrison-agent model list")
    earlier = bench_history.read()
    client = AgentClient(load_config(arguments.config).socket_path)
    view: ModelView = client.get("models", arguments.name)
    load_and_wait(client, view["alias"])
    heat = _Heat()
    busy = _loaded(client, view)
    if busy is not None and busy["active"]:
        print(f"{view['alias']} answers {busy['active']} other requests now: it will look slower", file=sys.stderr)
    rows = _measure(client, view, arguments)
    records = [{**_common(view, _loaded(client, view), heat), **row.to_dict()} for row in rows]
    if arguments.output == "json":
        print_json(records)
    else:
        print(render(records, earlier))
    bench_history.append(records)  # last: what took minutes to measure is shown even if it cannot be kept
    return 0


def _measure(client: AgentClient, view: ModelView, arguments: argparse.Namespace) -> list[Row]:
    spinner: Spinner | None = None

    def shows(text: str) -> None:
        nonlocal spinner
        if spinner is not None:
            spinner.stop()
        spinner = Spinner(text)
        spinner.start()

    try:
        if view["engine"] == Engine.ONNXRUNTIME.value:
            manifest = Manifest.model_validate(client.get("models", view["alias"], "manifest"))
            return list(
                measure_tensors(
                    client,
                    manifest,
                    requests=arguments.generate or TENSOR_REQUESTS,
                    repetitions=arguments.repetitions,
                    concurrent=arguments.concurrent or _TENSORS_AT_ONCE,
                    shows=shows,
                )
            )
        return list(
            measure_text(
                client,
                view["alias"],
                prompt=arguments.prompt,
                generate=arguments.generate or _GENERATE,
                repetitions=arguments.repetitions,
                concurrent=arguments.concurrent or 1,
                shows=shows,
            )
        )
    finally:
        if spinner is not None:
            spinner.stop()


class _Heat:
    """Temperature and throttling, before and now."""

    def __init__(self) -> None:
        self._temperature_c, self._throttling = read_sample().temperature_c, read_throttling()

    def to_dict(self) -> dict[str, Any]:
        """Return both moments; ``throttled`` None where the board does not say."""
        after = read_throttling()
        return {
            "temperature_c": [self._temperature_c, read_sample().temperature_c],
            "throttled": None if after is None else _reasons(self._throttling or Throttling(), after),
        }


def _reasons(before: Throttling, after: Throttling) -> list[str]:
    """Return why the board was slowed down meanwhile, as far as it can be told."""
    new = set(after.since_start) - set(before.since_start)
    reasons = sorted({*before.now, *after.now, *new})
    return [*reasons, *(["cores slowed for heat"] if after.count > before.count else [])]


def _loaded(client: AgentClient, view: ModelView) -> LoadedView | None:
    views: list[LoadedView] = client.get("loaded")
    return next((one for one in views if one["alias"] == view["alias"]), None)


def _common(view: ModelView, loaded: LoadedView | None, heat: _Heat) -> Record:
    return {
        "build_version": version("garrison"),
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu_info": cpu_name(),
        "backends": view["engine"],
        "model": view["id"],
        "alias": view["alias"],
        "variant": view["variant"],
        "model_type": view["quantization"],
        "model_size": round(view["file_size_mb"] * 1024 * 1024),
        "model_n_params": view["parameter_count"],
        "rss_bytes": None if loaded is None else loaded["size_bytes"],
        **heat.to_dict(),
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the board's processor calls itself, or the board (ARM), or at least its architecture."""
    names: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            names.setdefault(name.strip().lower(), value.strip())
    except OSError:
        pass
    return names.get("model name") or names.get("model") or platform.machine()


def render(records: list[Record], earlier: list[Record]) -> str:
    """Return one run as people read it, compared with the newest like it in ``earlier``."""
    first = records[0]
    rows = [
        (
            one["test"],
            f"{one['avg_ts']:.2f} ± {one['stddev_ts']:.2f}",
            one["unit"],
            f"{one['latency_ms_p50']:.2f} / {one['latency_ms_p95']:.2f}" if "latency_ms_p50" in one else None,
            _percent(change(one, earlier)),
        )
        for one in records
    ]
    heads = ["TEST", "MEAN ± DEV", "UNIT", "P50 / P95 MS", "CHANGE"]
    spare = [] if any(row[3] for row in rows) else ["P50 / P95 MS"]
    kept = [place for place, head in enumerate(heads) if head not in spare]
    results = table(
        [heads[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        right=["MEAN ± DEV", "P50 / P95 MS", "CHANGE"],
    )
    return f"{pairs(_facts(first))}\n\n{results}"


def _facts(record: Record) -> list[tuple[str, object]]:
    before, after = record["temperature_c"]
    throttled = record["throttled"]
    heat = "no sensor" if after is None else f"{after:.0f} °C" + ("" if before is None else f", {before:.0f} °C before")
    slowed = "the board does not say" if throttled is None else ", ".join(throttled) or "no"
    return [
        (
            "model",
            f"{record['model']} ({' '.join(part for part in (record['variant'], record['model_type']) if part)})",
        ),
        ("board", record["cpu_info"]),
        ("memory", None if record["rss_bytes"] is None else size(record["rss_bytes"])),
        ("temperature", heat),
        ("throttled", slowed),
    ]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:+.1f} %"


def _show_history(arguments: argparse.Namespace) -> int:
    kept = bench_history.read()
    wanted = [
        (place, one)
        for place, one in enumerate(kept)
        if arguments.name in (None, one["alias"], one["model"], one["model"].partition(":")[0])
    ]
    if arguments.output == "json":
        print_json([one for _, one in wanted])
    elif not wanted:
        print(f"nothing was measured yet (kept in {bench_history.history_path()})")
    else:
        rows = [
            (
                one["test_time"].replace("T", " ")[:16],
                one["model"],
                one["test"],
                f"{one['avg_ts']:.2f} ± {one['stddev_ts']:.2f}",
                _percent(change(one, kept[:place])),
            )
            for place, one in wanted
        ]
        heads = ["UTC", "MODEL", "TEST", "MEAN ± DEV", "CHANGE"]
        print(table(heads, rows, right=["MEAN ± DEV", "CHANGE"]))
    return 0
