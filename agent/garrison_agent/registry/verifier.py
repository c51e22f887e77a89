"""``trust.refresh`` and ``trust.offline`` in a short-lived process, so that python-tuf's memory goes away with it.

The parent sends one JSON request on stdin and reads one JSON answer from stdout. Run as
``python -m garrison_agent.registry.verifier``.
"""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from garrison_agent.registry.trust import Refresh, offline, refresh
from garrison_protocol import errors
from garrison_protocol.errors import GarrisonError, NotFoundError, UnavailableError
from garrison_protocol.states import Freshness

ROOT_FILE = "1.root.json"
SERVER_CA_FILE = "server-ca.pem"


class _Request(BaseModel):
    operation: Literal["refresh", "offline"]
    folder: Path
    url: str
    high_water: dict[str, int]
    want: list[str]
    floor: float | None
    """Unix seconds."""
    trusted_at: int = 0
    timeout_s: float


class _View(BaseModel):
    """``Refresh`` with its bytes in base64."""

    freshness: Freshness
    root: int
    timestamp: int
    snapshot: int
    targets: int
    fleet: str | None
    manifests: dict[str, str]
    refreshed_at: int


class _Failure(BaseModel):
    kind: str
    code: str
    message: str
    hint: str
    retryable: bool
    fields: dict[str, str | int | float | None]


class _Answer(BaseModel):
    view: _View | None = None
    failure: _Failure | None = None


class TrustVerifier:
    """Asks the verifier process; every call blocks, so make it in a thread.

    ``folder`` is the registry's folder with ``1.root.json`` and ``server-ca.pem``; ``url`` the controller's.
    """

    def __init__(self, folder: Path, url: str, *, timeout_s: float = 300) -> None:
        self._folder = folder
        self._url = url
        self._timeout_s = timeout_s

    def refresh(self, high_water: Mapping[str, int], floor: datetime, want: Sequence[str]) -> Refresh:
        """As ``trust.refresh``, over HTTPS.

        Raises:
            GarrisonError: those of ``trust.refresh``; NotFoundError ``registry.not_enrolled``; UnavailableError
                ``registry.verifier_failed``.
        """
        return self._ask(
            _Request(
                operation="refresh",
                folder=self._folder,
                url=self._url,
                high_water=dict(high_water),
                want=list(want),
                timeout_s=self._timeout_s,
                floor=floor.timestamp(),
            )
        )

    def offline(
        self, high_water: Mapping[str, int], trusted_at: int, want: Sequence[str], floor: datetime | None = None
    ) -> Refresh:
        """As ``trust.offline``.

        Raises:
            GarrisonError: those of ``trust.offline``; NotFoundError ``registry.not_enrolled``; UnavailableError
                ``registry.verifier_failed``.
        """
        return self._ask(
            _Request(
                operation="offline",
                folder=self._folder,
                url=self._url,
                high_water=dict(high_water),
                want=list(want),
                timeout_s=self._timeout_s,
                floor=None if floor is None else floor.timestamp(),
                trusted_at=trusted_at,
            )
        )

    def _ask(self, request: _Request) -> Refresh:
        command = [sys.executable, "-P", "-m", "garrison_agent.registry.verifier"]
        try:
            done = subprocess.run(
                command,
                input=request.model_dump_json().encode(),
                capture_output=True,
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _failed(f"it did not answer within {self._timeout_s:.0f} s") from error
        except OSError as error:
            raise _failed(f"it could not be started: {error}") from error
        try:
            answer = _Answer.model_validate_json(done.stdout)
        except ValidationError as error:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise _failed(f"it ended with status {done.returncode}: {last[:300]}") from error
        if answer.failure is not None:
            raise _error(answer.failure)
        if answer.view is None:
            raise _failed("it gave no answer")
        return _refresh(answer.view)


def _failed(cause: str) -> UnavailableError:
    return UnavailableError(
        "registry.verifier_failed",
        f"the metadata verifier process failed: {cause}",
        hint="check free memory and the agent's installation (`garrison-agent doctor`)",
        retryable=True,
    )


def _error(failure: _Failure) -> GarrisonError:
    kind = getattr(errors, failure.kind, GarrisonError)
    if not (isinstance(kind, type) and issubclass(kind, GarrisonError)):
        kind = GarrisonError
    return kind(failure.code, failure.message, hint=failure.hint, retryable=failure.retryable, **failure.fields)


def _refresh(view: _View) -> Refresh:
    return Refresh(
        freshness=view.freshness,
        root=view.root,
        timestamp=view.timestamp,
        snapshot=view.snapshot,
        targets=view.targets,
        fleet=None if view.fleet is None else base64.b64decode(view.fleet),
        manifests={path: base64.b64decode(data) for path, data in view.manifests.items()},
        refreshed_at=view.refreshed_at,
    )


def main() -> int:
    """Answer one request from stdin; the status is 0 even for a refusal, which is an answer."""
    request = _Request.model_validate_json(sys.stdin.buffer.read())
    signal.alarm(max(1, round(request.timeout_s)))  # if the agent was killed, nobody else ends this process
    try:
        answer = _Answer(view=_run(request))
    except GarrisonError as error:
        answer = _Answer(
            failure=_Failure(
                kind=type(error).__name__,
                code=error.code,
                message=error.message,
                hint=error.hint,
                retryable=error.retryable,
                fields=error.fields,
            )
        )
    sys.stdout.write(json.dumps(answer.model_dump(mode="json")))
    return 0


def _run(request: _Request) -> _View:
    from garrison_agent.registry.http_source import HttpsOpener, HttpSource

    floor = None if request.floor is None else datetime.fromtimestamp(request.floor, UTC)
    try:
        bootstrap = (request.folder / ROOT_FILE).read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(
            "registry.not_enrolled",
            f"{request.folder / ROOT_FILE} is missing",
            hint="enrol the board with `garrison-agent enroll`",
        ) from error
    if request.operation == "refresh":
        opener = HttpsOpener(request.url, request.folder / SERVER_CA_FILE, floor=floor)
        view = refresh(
            HttpSource(opener),
            request.folder,
            bootstrap=bootstrap,
            high_water=request.high_water,
            floor=floor or datetime.fromtimestamp(0, UTC),
            want=request.want,
        )
    else:
        view = offline(
            request.folder,
            bootstrap=bootstrap,
            high_water=request.high_water,
            trusted_at=request.trusted_at,
            want=request.want,
            floor=floor,
        )
    return _View(
        freshness=view.freshness,
        root=view.root,
        timestamp=view.timestamp,
        snapshot=view.snapshot,
        targets=view.targets,
        fleet=None if view.fleet is None else base64.b64encode(view.fleet).decode(),
        manifests={path: base64.b64encode(data).decode() for path, data in view.manifests.items()},
        refreshed_at=view.refreshed_at,
    )


if __name__ == "__main__":
    sys.exit(main())
