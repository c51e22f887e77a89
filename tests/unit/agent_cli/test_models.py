from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from garrison_agent.api.commands import (
    Command,
    GetVariants,
    ListLoaded,
    ListModels,
    LoadModel,
    ModelView,
    RunningView,
    VariantsView,
    VariantView,
    model_view,
)
from garrison_agent.cli.main import main
from garrison_agent.cli.models import parse_filters, render_loaded
from garrison_protocol.errors import InvalidError, UnavailableError
from garrison_protocol.states import Engine
from tests.fakes.local_owner import DIGEST, make_manifest
from tests.unit.agent_cli.conftest import Serve


def view(name: str = "smollm2", *, engine: Engine = Engine.LLAMA_CPP, loaded: bool = True) -> ModelView:
    manifest = make_manifest(name, engine=engine)
    made = model_view(
        manifest,
        manifest.variants[0],
        alias=f"a-{name}",
        manifest_sha256=DIGEST,
        state="ACTIVE",
        serving=True,
        loaded=loaded,
    )
    return {**made, "capabilities": ["chat", "completion"]}


BOTH = [view(), view("magika", engine=Engine.ONNXRUNTIME, loaded=False)]


def passing(*filters: str) -> list[str]:
    matches = parse_filters(filters)
    return [one["name"] for one in BOTH if all(match(one) for match in matches)]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (["name=smollm2"], ["smollm2"]),
        (["name=!smollm2"], ["magika"]),
        (["name=smol*"], ["smollm2"]),
        (["alias=!A-MAG*"], ["smollm2"]),
        (["device=cpu"], ["smollm2", "magika"]),
        (["device=gpu"], []),
        (["provider=cpu*", "engine=onnxruntime"], ["magika"]),
        (["loaded=no"], ["magika"]),
        (["loaded=!false"], ["smollm2"]),
        (["capability=chat", "license=apache*", "publisher=*", "task=chat-completion"], ["smollm2", "magika"]),
        (["capability=!chat"], []),
        (["tools=yes"], []),
    ],
)
def test_filters(filters: list[str], names: list[str]) -> None:
    assert passing(*filters) == names


@pytest.mark.parametrize("text", ["colour=red", "name", "", "=x", "loaded=maybe"])
def test_filters_that_mean_nothing_say_what_would(text: str) -> None:
    with pytest.raises(InvalidError, match=r"cli\.filter_invalid") as wrong:
        passing(text)
    assert "alias" in wrong.value.hint or "yes" in wrong.value.hint


def loaded(**changes: object) -> RunningView:
    fields: dict[str, object] = {
        "alias": "chat",
        "id": "smollm2:1.0.0",
        "size_bytes": 300 * 2**20,
        "loaded_since": 1000,
        "expires_at": 1900,
        "pinned": False,
        "active": 2,
        "tokens_per_s": 12.34,
    }
    return {**fields, **changes}  # type: ignore[typeddict-item]


def answer(command: Command) -> object:
    match command:
        case ListModels():
            return BOTH
        case ListLoaded():
            return [loaded()]
        case GetVariants():
            return variants()
        case _:
            raise AssertionError(command)


def variants() -> VariantsView:
    one = VariantView(
        name="cpu-q4",
        engine="llama.cpp",
        device_type="CPU",
        execution_provider="CPUExecutionProvider",
        quantization="Q4_1",
        memory_mb=400,
        size_bytes=90 * 2**20,
        missing_bytes=0,
        fits=True,
        chosen=True,
        reasons=[],
    )
    other: VariantView = {
        **one,
        "name": "cpu-f16",
        "memory_mb": 9000,
        "missing_bytes": 90 * 2**20,
        "fits": False,
        "chosen": False,
        "reasons": ["takes 9000 MiB of memory, the budget is 3200"],
    }
    return VariantsView(
        id="smollm2:1.0.0",
        alias="chat",
        architecture="aarch64",
        cpu_features=["asimd"],
        engines=["llama.cpp"],
        memory_mb=4000,
        memory_budget_mb=3200,
        disk_free_mb=900,
        variants=[one, other],
    )


def run(config: Path, *words: str) -> int:
    return main([*words, "--config", str(config)])


def test_list_with_filters(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(answer)
    assert run(config, "model", "list", "--filter", "loaded=no", "--filter", "name=m*", "-o", "json") == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["magika"]
    assert run(config, "model", "list", "--filter", "device=gpu") == 0
    assert capsys.readouterr().out == "none of the 2 models on this board matches\n"
    assert run(config, "model", "list", "--filter", "colour=red") == 2


def test_a_narrow_terminal_gets_the_columns_that_matter(
    serve: Serve, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(answer)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 24)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(config, "model", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 60
    assert lines[0].split()[:2] == ["ALIAS", "MODEL"]
    assert lines[0].split()[-1] == "SIZE"
    assert "LICENSE" not in lines[0]


def test_variants_say_what_does_not_fit_and_why(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(answer)
    assert run(config, "model", "info", "chat", "--variants") == 0
    out = capsys.readouterr().out
    assert "4000 MiB of memory, 3200 of them for models" in out
    assert "cpu-q4: fits, and is the one this board takes" in out
    assert "cpu-f16: does not fit" in out
    assert "- takes 9000 MiB of memory, the budget is 3200" in out
    assert "90 MiB of disk, of which 90 MiB are not here yet" in out
    assert run(config, "model", "info", "chat", "--variants", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == variants()


def test_ps(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(answer)
    assert run(config, "ps", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == [loaded()]
    text = render_loaded([loaded(), loaded(expires_at=None, pinned=True, tokens_per_s=None)], 1300)
    first, second = (line.split("  ") for line in text.splitlines()[1:])
    assert [part.strip() for part in first if part] == [
        "chat",
        "smollm2:1.0.0",
        "300 MiB",
        "5 min ago",
        "in 10 min",
        "2",
        "12.3",
    ]
    assert [part.strip() for part in second if part][4:] == ["pinned", "2", "-"]


def test_loading_waits_on_and_carries_the_keep_alive(
    serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def slow_once(command: Command) -> object:
        calls.append(command)
        if len(calls) == 1:
            return UnavailableError("model.loading", "slow is still being loaded", retryable=True)
        return {"id": "slow:1", "alias": "slow", "outcome": "loaded"}

    serve(slow_once)
    assert run(config, "load", "slow", "--keep-alive", "10m") == 0
    assert calls == [LoadModel("slow", 600)] * 2
    assert run(config, "load", "slow", "--keep-alive", "soon") == 2
    assert len(calls) == 2
