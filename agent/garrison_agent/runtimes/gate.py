"""The gate: does the model answer well here, on this board, before anybody is served by it?

Runs against a worker's unix socket, under its ``/internal`` paths, with the manifest's cases; no user traffic is seen
or recorded. Blocking: call it in a thread of its own. Of the worker's answers nothing is believed: what has another
form than it should fails the gate.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from garrison_agent.runtimes.patterns import pattern_matches
from garrison_agent.runtimes.scoring import accuracy, choice_passes, label_passes, similarity_passes
from garrison_agent.runtimes.status import Duration, Speed
from garrison_protocol.manifest import (
    ChoiceCase,
    Evaluation,
    EvaluationCase,
    GenerateCase,
    LabelCase,
    SimilarityCase,
)
from garrison_protocol.messages.desired import GateLimits
from garrison_protocol.messages.report import EvaluationSummary

CASE_TIMEOUT_S = 300.0
"""For one case: a board may read a long prompt at ten tokens a second."""
_SPEED_PROMPT = "Write a short story about a lighthouse keeper and a storm."
_SPEED_TOKENS = 48
_MAX_HEALTH_BYTES = 64 * 1024
_MAX_ANSWER_BYTES = 64 * 1024 * 1024

_T = TypeVar("_T")
_TEXT = TypeAdapter(str)
_LOG_PROBABILITIES = TypeAdapter(list[float | None])
_SCORES = TypeAdapter(list[float | str | None])
_VECTOR = TypeAdapter(list[float])
_DURATION: TypeAdapter[Duration | None] = TypeAdapter(Duration | None)
_SPEED: TypeAdapter[Speed | None] = TypeAdapter(Speed | None)


@dataclass(frozen=True)
class GateResult:
    """``failure_code`` is None exactly when ``passed``: ``gate.accuracy``, ``gate.rss``, ``gate.ttft``,
    ``gate.tokens_per_s``, ``gate.error`` (the worker did not answer), or ``gate.cancelled``."""

    passed: bool
    summary: EvaluationSummary
    failure_code: str | None
    message: str


class _CaseError(Exception):
    """The worker refused a case, or failed on it."""


class _CancelledError(Exception):
    """The caller asked to stop."""


@dataclass
class _Tally:
    """What is known so far."""

    passed: int = 0
    first_failure: str = ""
    ttft_ms: float | None = None
    tokens_per_s: float | None = None

    def fail(self, case_id: str, reason: str) -> None:
        self.first_failure = self.first_failure or f"first failed case {case_id}: {reason}"


def run_gate(
    socket_path: Path,
    model_id: str,
    evaluation: Evaluation,
    limits: GateLimits,
    *,
    rss_mb: float | None,
    cancelled: Callable[[], bool] = lambda: False,
) -> GateResult:
    """Return whether the model behind ``socket_path`` may go into service.

    A case that the worker refuses or fails on counts as failed; a worker that does not answer ends the gate.
    Text models are also timed, with one short greedy answer of fixed length after the cases have warmed them up.
    """
    tally = _Tally()
    failure: tuple[str, str] | None
    try:
        for case in evaluation.cases:
            if cancelled():
                raise _CancelledError
            _run_case(socket_path, model_id, case, tally)
        if cancelled():
            raise _CancelledError
        if any(isinstance(case, ChoiceCase | GenerateCase) for case in evaluation.cases):
            _time_generation(socket_path, tally)
        failure = _judge(evaluation, limits, tally, rss_mb)
    except _CancelledError:
        failure = "gate.cancelled", "the evaluation was stopped"
    except (OSError, http.client.HTTPException, ValueError) as error:
        failure = "gate.error", f"the worker did not answer: {error or type(error).__name__}"
    count = len(evaluation.cases)
    summary = EvaluationSummary(
        cases_sha256=evaluation.cases_sha256,
        cases=count,
        passed=tally.passed,
        accuracy=accuracy(tally.passed, count),
        tokens_per_s=tally.tokens_per_s,
        ttft_ms=tally.ttft_ms,
        rss_mb=rss_mb,
    )
    code, message = failure or (None, f"{tally.passed} of {count} cases passed")
    return GateResult(failure is None, summary, code, message)


def _judge(evaluation: Evaluation, limits: GateLimits, tally: _Tally, rss_mb: float | None) -> tuple[str, str] | None:
    """Return the first limit that is missed, or None. A limit whose measure is missing is missed."""
    reached = accuracy(tally.passed, len(evaluation.cases))
    if reached < evaluation.min_accuracy:
        return (
            "gate.accuracy",
            f"{tally.passed} of {len(evaluation.cases)} cases passed ({reached:.2f}); "
            f"{evaluation.min_accuracy:.2f} is needed; {tally.first_failure}",
        )
    if limits.max_rss_mb is not None and (rss_mb is None or rss_mb > limits.max_rss_mb):
        return "gate.rss", f"the worker uses {_shown(rss_mb, 'MiB')}; the limit is {limits.max_rss_mb:g} MiB"
    if limits.max_ttft_ms is not None and (tally.ttft_ms is None or tally.ttft_ms > limits.max_ttft_ms):
        return "gate.ttft", f"the first token came after {_shown(tally.ttft_ms, 'ms')}; limit {limits.max_ttft_ms:g} ms"
    wanted = limits.min_tokens_per_s
    if wanted is not None and (tally.tokens_per_s is None or tally.tokens_per_s < wanted):
        return "gate.tokens_per_s", f"{_shown(tally.tokens_per_s, 'tokens/s')}; at least {wanted:g} are needed"
    return None


def _shown(value: float | None, unit: str) -> str:
    return f"{value:.1f} {unit}" if value is not None else f"an unknown number of {unit}"


def _run_case(socket_path: Path, model_id: str, case: EvaluationCase, tally: _Tally) -> None:
    try:
        passed, seen = _try_case(socket_path, model_id, case)
    except _CaseError as error:
        tally.fail(case.id, str(error))
        return
    if passed:
        tally.passed += 1
    else:
        tally.fail(case.id, seen)


def _try_case(socket_path: Path, model_id: str, case: EvaluationCase) -> tuple[bool, str]:
    """Return the verdict on one case, and a few words on what the model did."""
    match case:
        case ChoiceCase():
            body = {"prompt": case.prompt, "choices": list(case.choices)}
            chances = _read(_LOG_PROBABILITIES, _post(socket_path, "/internal/score", body), "logprobs")
            listed = ", ".join("none" if one is None else f"{one:.2f}" for one in chances[: len(case.choices)])
            return choice_passes(case, chances), f"the right choice does not score best: {listed}"
        case GenerateCase():
            answer = _generate(
                socket_path,
                {"messages": [turn.model_dump() for turn in case.messages], "max_tokens": case.max_tokens},
            )
            text = _read(_TEXT, answer, "choices", 0, "message", "content")
            return pattern_matches(case.pattern, text), f"the answer does not match {case.pattern!r}"
        case LabelCase():
            name = model_id.partition(":")[0]
            request = {
                "inputs": [tensor.model_dump(mode="json") for tensor in case.inputs],
                "outputs": [{"name": case.output}],
            }
            answer = _post(socket_path, f"/internal/v2/models/{name}/infer", request)
            scores = _read(_SCORES, answer, "outputs", 0, "data")
            return label_passes(case, scores), f"index {case.expected_index} is not the highest, or not high enough"
        case SimilarityCase():
            texts = [case.anchor, case.closer, case.farther]
            answer = _post(socket_path, "/internal/v1/embeddings", {"input": texts})
            vectors = [_read(_VECTOR, answer, "data", index, "embedding") for index in range(len(texts))]
            return similarity_passes(case, vectors), "the closer text is not more similar, or not by enough"


def _time_generation(socket_path: Path, tally: _Tally) -> None:
    """Measure time to first token and tokens per second; a model that refuses stays unmeasured."""
    body = {"prompt": _SPEED_PROMPT, "max_tokens": _SPEED_TOKENS, "temperature": 0, "ignore_eos": True}
    try:
        answer = _post(socket_path, "/internal/v1/completions", body)
    except _CaseError:
        return
    tally.ttft_ms = _read(_DURATION, answer, "timings", "ttft_ms")
    tally.tokens_per_s = _read(_SPEED, answer, "timings", "tokens_per_s")


def _generate(socket_path: Path, body: dict[str, Any]) -> Any:
    return _post(socket_path, "/internal/v1/chat/completions", {**body, "temperature": 0})


def _post(socket_path: Path, path: str, body: object) -> Any:
    """Return the JSON answer to a POST.

    Raises:
        _CaseError: The status is not 200.
        OSError, HTTPException, ValueError: The worker is gone, or answers nonsense.
    """
    connection = UnixConnection(socket_path, CASE_TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read(_MAX_ANSWER_BYTES)
    finally:
        connection.close()
    if response.status != 200:
        raise _CaseError(f"status {response.status}: {answer[:200].decode('utf-8', 'replace')}")
    try:
        return json.loads(answer)
    except RecursionError as error:
        raise ValueError("the answer is nested too deeply") from error


def _read(kind: TypeAdapter[_T], answer: Any, *keys: str | int) -> _T:
    """Return what stands in ``answer`` at ``keys``.

    Raises:
        ValueError: Nothing does, or something of another kind.
    """
    where = ".".join(map(str, keys))
    try:
        for key in keys:
            answer = answer[key]
    except (LookupError, TypeError) as error:
        raise ValueError(f"the answer holds no {where}") from error
    try:
        return kind.validate_python(answer)
    except ValidationError as error:
        raise ValueError(f"the answer's {where} has another form than it should") from error


def read_health(socket_path: Path, timeout_s: float) -> dict[str, object] | None:
    """Return what a worker says of itself, None if it does not answer, sensibly and in time."""
    connection = UnixConnection(socket_path, timeout_s)
    try:
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read(_MAX_HEALTH_BYTES))
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        return None
    finally:
        connection.close()
    return health if isinstance(health, dict) else None


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
