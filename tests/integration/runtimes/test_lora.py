"""A base model and an adapter as one variant: SmolLM2 with a LoRA of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from garrison_agent.runtimes.spec import WorkerSpec
from tests.integration.runtimes.tiny_models import smollm2_adapter
from tests.integration.runtimes.workers import WatchedWorker, llama_spec, smollm2, worker_file

pytestmark = pytest.mark.integration

GREEDY = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}


def spec_with(file: Path, socket: Path, **settings: str | int) -> WorkerSpec:
    files = (worker_file(smollm2(), "model.gguf"), worker_file(file, "adapters/pirate.gguf"))
    return llama_spec(smollm2(), socket, files=files, settings={"adapter": "adapters/pirate.gguf", **settings})


def greedy(worker: WatchedWorker) -> str:
    return str(worker.post("/v1/completions", GREEDY)["choices"][0]["text"])


def test_an_adapter_changes_answers_by_its_scale(llama: WatchedWorker, tmp_path: Path, short_folder: Path) -> None:
    adapter = smollm2_adapter(tmp_path / "adapter.gguf")
    answers: dict[int | str | None, str] = {}
    for scale in (0, None, "0.5"):
        settings = {} if scale is None else {"adapter_scale": scale}
        with WatchedWorker(spec_with(adapter, short_folder / "a.sock", **settings)) as worker:
            assert worker.ready().metadata["adapter"] == "adapters/pirate.gguf"
            answers[scale] = greedy(worker)
    base = greedy(llama)
    assert "adapter" not in llama.ready().metadata
    assert answers[0] == base
    assert answers[None] != base
    assert answers["0.5"] != answers[None]


@pytest.mark.parametrize("damage", ["truncated", "no gguf", "other model", "a whole model"])
def test_an_adapter_that_cannot_be_used_fails_and_says_which(damage: str, tmp_path: Path, short_folder: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    match damage:
        case "truncated":
            whole = smollm2_adapter(tmp_path / "whole.gguf").read_bytes()
            adapter.write_bytes(whole[: len(whole) // 2])
        case "no gguf":
            adapter.write_bytes(b"not a model" * 100)
        case "other model":
            smollm2_adapter(adapter, width=64)
        case _:
            adapter = smollm2()
    with WatchedWorker(spec_with(adapter, short_folder / "a.sock")) as worker:
        failed = worker.failed()
    assert failed.code == "model.load_failed"
    assert "adapters/pirate.gguf" in failed.message


@pytest.mark.parametrize(
    "settings", [{"adapter": "model.gguf"}, {"adapter": "none.gguf"}, {"adapter": 3}, {"adapter_scale": "strong"}]
)
def test_settings_that_name_no_adapter_are_refused(
    settings: dict[str, str | int], tmp_path: Path, short_folder: Path
) -> None:
    adapter = smollm2_adapter(tmp_path / "adapter.gguf")
    with WatchedWorker(spec_with(adapter, short_folder / "a.sock", **settings)) as worker:
        failed = worker.failed()
    assert failed.code == "model.load_failed"
    assert "model_settings" in failed.message
