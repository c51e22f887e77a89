"""The gate with the demo's own cases: good models pass, a damaged one does not, whatever its digests say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from threading import Thread
from uuid import uuid4

import pytest

import demo
from demo.damage import damage_gguf
from garrison_agent.runtimes.gate import run_gate
from garrison_protocol.manifest import ChatMessage, Evaluation, GenerateCase, SimilarityCase
from garrison_protocol.messages.desired import GateLimits
from tests.integration.runtimes.workers import WatchedWorker, llama_spec, smollm2

pytestmark = pytest.mark.integration

NO_LIMITS = GateLimits()
COLOURS = GenerateCase(id="colour", messages=(ChatMessage(role="user", content="Name a colour."),), pattern="red")
SENTENCES = SimilarityCase(id="near", anchor="a cat", closer="a kitten", farther="a bridge")
CASES = {
    "colours": Evaluation(cases=(COLOURS,), min_accuracy=1),
    "sentences": Evaluation(cases=(SENTENCES,), min_accuracy=1),
}


def evaluation_of(draft: str) -> Evaluation:
    path = Path(demo.__path__[0]) / "models" / f"{draft}.json"
    return Evaluation.model_validate(json.loads(path.read_text())["evaluation"])


def test_the_real_model_passes_and_is_measured(llama: WatchedWorker) -> None:
    evaluation = evaluation_of("smollm2")
    result = run_gate(llama.spec.socket, llama.spec.model_id, evaluation, NO_LIMITS, rss_mb=llama.worker.rss_mb())
    assert result.passed, result.message
    assert result.failure_code is None
    summary = result.summary
    assert (summary.cases, summary.cases_sha256) == (8, evaluation.cases_sha256)
    assert summary.accuracy >= 0.75
    assert summary.tokens_per_s is not None
    assert summary.tokens_per_s > 0
    assert summary.ttft_ms is not None
    assert summary.rss_mb is not None


@pytest.mark.parametrize("seed", [1, 2])
def test_a_damaged_model_loads_and_fails(seed: int, tmp_path: Path, short_folder: Path) -> None:
    bad = tmp_path / "bad.gguf"
    damaged = damage_gguf(smollm2(), bad, seed=seed)
    assert damaged > 20_000_000
    assert bad.stat().st_size == smollm2().stat().st_size
    with WatchedWorker(llama_spec(bad, short_folder / "bad.sock")) as worker:
        worker.ready()
        result = run_gate(worker.spec.socket, worker.spec.model_id, evaluation_of("smollm2"), NO_LIMITS, rss_mb=None)
        assert not result.passed
        assert result.failure_code == "gate.accuracy"
        assert result.summary.accuracy < 0.75
        assert worker.health()["status"] == "ok", "a useless answer is no crash"


def test_magika_passes_its_label_cases(magika_worker: WatchedWorker) -> None:
    spec = magika_worker.spec
    result = run_gate(spec.socket, spec.model_id, evaluation_of("magika"), NO_LIMITS, rss_mb=64)
    assert result.passed, result.message
    assert result.summary.accuracy == 1
    assert result.summary.tokens_per_s is None


@pytest.mark.parametrize(
    ("limits", "rss_mb", "code"),
    [
        (GateLimits(max_rss_mb=10), 300.0, "gate.rss"),
        (GateLimits(max_rss_mb=10), None, "gate.rss"),
        (GateLimits(max_ttft_ms=0.001), 300.0, "gate.ttft"),
        (GateLimits(min_tokens_per_s=1e6), 300.0, "gate.tokens_per_s"),
        (GateLimits(max_rss_mb=1000, max_ttft_ms=60_000, min_tokens_per_s=0.1), 300.0, None),
    ],
)
def test_a_rollouts_limits_hold(llama: WatchedWorker, limits: GateLimits, rss_mb: float | None, code: str) -> None:
    result = run_gate(llama.spec.socket, llama.spec.model_id, evaluation_of("smollm2"), limits, rss_mb=rss_mb)
    assert result.failure_code == code
    assert result.passed is (code is None)


def test_generated_answers_are_matched(llama: WatchedWorker) -> None:
    def case(name: str, pattern: str) -> GenerateCase:
        messages = (ChatMessage(role="user", content="Name three colors."),)
        return GenerateCase(id=name, messages=messages, pattern=pattern, max_tokens=24)

    evaluation = Evaluation(cases=(case("right", "(?i)red|blue"), case("wrong", "(?i)elephant")), min_accuracy=0.5)
    result = run_gate(llama.spec.socket, llama.spec.model_id, evaluation, NO_LIMITS, rss_mb=None)
    assert (result.passed, result.summary.passed) == (True, 1)


def test_cases_for_another_kind_of_model_fail(llama: WatchedWorker) -> None:
    result = run_gate(llama.spec.socket, llama.spec.model_id, evaluation_of("magika"), NO_LIMITS, rss_mb=None)
    assert result.failure_code == "gate.accuracy"
    assert "python" in result.message


def test_a_worker_that_does_not_answer_ends_the_gate(short_folder: Path) -> None:
    result = run_gate(short_folder / "nobody.sock", "m:1", evaluation_of("smollm2"), NO_LIMITS, rss_mb=None)
    assert (result.passed, result.failure_code) == (False, "gate.error")
    assert result.summary.passed == 0


@contextmanager
def worker_answering(answer: bytes, folder: Path) -> Iterator[Path]:
    """Give the socket of a worker that says the same to everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def address_string(self) -> str:
            return "unix"

    path = folder / f"{uuid4().hex[:8]}.sock"
    with UnixStreamServer(str(path), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield path
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"logprobs": 7, "choices": [], "outputs": {}, "data": "x"}',
        b'{"logprobs": ["-1", {}], "choices": [{"message": null}], "outputs": [{}], "data": [{}]}',
        b'{"logprobs": [-1, [2]], "choices": [{"message": {"content": 7}}], "outputs": [{"data": [{}]}],'
        b' "data": [{"embedding": ["x"]}]}',
    ],
)
@pytest.mark.parametrize("draft", ["smollm2", "magika", "colours", "sentences"])
def test_a_worker_that_others_have_taken_over_fails_the_gate(draft: str, answer: bytes, short_folder: Path) -> None:
    with worker_answering(answer, short_folder) as path:
        result = run_gate(path, "m:1", CASES.get(draft) or evaluation_of(draft), NO_LIMITS, rss_mb=None)
    assert (result.passed, result.failure_code) == (False, "gate.error")


@pytest.mark.parametrize("timings", [7, {}, {"ttft_ms": "1", "tokens_per_s": []}, {"ttft_ms": -1, "tokens_per_s": 1}])
def test_times_that_are_none_fail_the_gate(timings: object, short_folder: Path) -> None:
    answer = json.dumps({"choices": [{"message": {"content": "red"}}], "timings": timings}).encode()
    with worker_answering(answer, short_folder) as path:
        result = run_gate(path, "m:1", CASES["colours"], NO_LIMITS, rss_mb=None)
    assert (result.passed, result.failure_code) == (False, "gate.error")


def test_the_gate_stops_when_asked(llama: WatchedWorker) -> None:
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > 2

    evaluation = evaluation_of("smollm2")
    result = run_gate(llama.spec.socket, llama.spec.model_id, evaluation, NO_LIMITS, rss_mb=None, cancelled=cancelled)
    assert (result.passed, result.failure_code, result.summary.passed) == (False, "gate.cancelled", 2)
