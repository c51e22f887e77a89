"""``trust.refresh`` and ``trust.offline`` in a short-lived process, so that python-tuf's memory goes away with it.

The parent sends one request on stdin, a JSON line, and reads one answer from stdout. The child itself reads HTTPS;
for anything else it asks its parent in between (``pipe_source``). Run as
``python -m garrison_agent.registry.verifier``.
"""

from __future__ import annotations

import base64
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ValidationError

from garrison_agent.registry.pipe_source import MAX_LINE_BYTES, Failure, Line, PipeSource, answer
from garrison_agent.registry.source import MetadataSource
from garrison_agent.registry.trust import Refresh, offline, refresh
from garrison_protocol.errors import GarrisonError, NotFoundError, UnavailableError
from garrison_protocol.states import Freshness

ROOT_FILE = "1.root.json"
SERVER_CA_FILE = "server-ca.pem"
SLOW_SHARE = 0.7
"""Of its time, before slow answers are given up: an unreachable controller is another thing than a check that hangs."""


class _Request(BaseModel):
    operation: Literal["refresh", "offline"]
    folder: Path
    carrier: Literal["https", "pipe"] = "https"
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
    families: dict[str, int]
    withheld: dict[str, str]
    refreshed_at: int
    expires: dict[str, int]


class _Said(Line):
    view: _View | None = None
    failure: Failure | None = None


class Verifier(Protocol):
    """What asks a verifier process; every call blocks, so make it in a thread."""

    def refresh(
        self,
        high_water: Mapping[str, int],
        floor: datetime,
        want: Sequence[str],
        source: MetadataSource | None = None,
    ) -> Refresh:
        """See ``TrustVerifier.refresh``."""
        ...

    def offline(
        self, high_water: Mapping[str, int], trusted_at: int, want: Sequence[str], floor: datetime | None = None
    ) -> Refresh:
        """See ``TrustVerifier.offline``."""
        ...


class TrustVerifier:
    """Asks the verifier process; every call blocks, so make it in a thread.

    ``folder`` is the registry's folder with ``1.root.json`` and ``server-ca.pem``; ``url`` the controller's.
    """

    def __init__(self, folder: Path, url: str, *, timeout_s: float = 300) -> None:
        self._folder = folder
        self._url = url
        self._timeout_s = timeout_s

    def refresh(
        self,
        high_water: Mapping[str, int],
        floor: datetime,
        want: Sequence[str],
        source: MetadataSource | None = None,
    ) -> Refresh:
        """As ``trust.refresh``: over HTTPS, or through a ``source`` of this process.

        Raises:
            GarrisonError: those of ``trust.refresh``; NotFoundError ``registry.not_enrolled``; UnavailableError
                ``registry.verifier_failed``.
        """
        return self._ask(
            _Request(
                operation="refresh",
                folder=self._folder,
                carrier="https" if source is None else "pipe",
                url=self._url,
                high_water=dict(high_water),
                want=list(want),
                timeout_s=self._timeout_s,
                floor=floor.timestamp(),
            ),
            source,
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

    def _ask(self, request: _Request, source: MetadataSource | None = None) -> Refresh:
        command = [sys.executable, "-P", "-m", "garrison_agent.registry.verifier"]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise _failed(f"it could not be started: {error}") from error
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._timeout_s, end)
        timer.daemon = True
        timer.start()
        said, complaint = None, b""
        try:
            with contextlib.suppress(BrokenPipeError), process:  # closing a pipe flushes what nobody reads any more
                said = _converse(process, request, source)
                if said is None and process.stderr is not None:
                    complaint = process.stderr.read()
        finally:
            timer.cancel()
        if said is None and late.is_set():
            raise _failed(f"it did not answer within {self._timeout_s:.0f} s")
        if said is None:
            last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
            raise _failed(f"it ended with status {process.returncode}: {last[:300]}")
        if said.failure is not None:
            raise said.failure.error()
        if said.view is None:
            raise _failed("it gave no answer")
        return _refresh(said.view)


def _converse(process: subprocess.Popen[bytes], request: _Request, source: MetadataSource | None) -> _Said | None:
    """Return the child's last word, after answering its questions; None if it ended without one."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended; its output says more
        process.stdin.write(request.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        while line := process.stdout.readline(MAX_LINE_BYTES):
            try:
                said = _Said.model_validate_json(line)
            except ValidationError:
                return None
            if said.question is None or source is None:
                return said
            answer(said.question, source, process.stdin)
    return None


def _failed(cause: str) -> UnavailableError:
    return UnavailableError(
        "registry.verifier_failed",
        f"the metadata verifier process failed: {cause}",
        hint="check free memory and the agent's installation (`garrison-agent doctor`)",
        retryable=True,
    )


def _refresh(view: _View) -> Refresh:
    return Refresh(
        freshness=view.freshness,
        root=view.root,
        timestamp=view.timestamp,
        snapshot=view.snapshot,
        targets=view.targets,
        fleet=None if view.fleet is None else base64.b64decode(view.fleet),
        manifests={path: base64.b64decode(data) for path, data in view.manifests.items()},
        families=view.families,
        withheld=view.withheld,
        refreshed_at=view.refreshed_at,
        expires=view.expires,
    )


def main() -> int:
    """Answer one request from stdin; the status is 0 even for a refusal, which is an answer."""
    request = _Request.model_validate_json(sys.stdin.buffer.readline())
    signal.alarm(max(1, round(request.timeout_s)))  # if the agent was killed, nobody else ends this process
    try:
        said = _Said(view=_run(request))
    except GarrisonError as error:
        said = _Said(failure=Failure.of(error))
    sys.stdout.buffer.write(said.model_dump_json().encode() + b"\n")
    sys.stdout.buffer.flush()
    return 0


def _run(request: _Request) -> _View:
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
        view = refresh(
            _source(request, floor),
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
        families=dict(view.families),
        withheld=dict(view.withheld),
        refreshed_at=view.refreshed_at,
        expires=dict(view.expires),
    )


def _source(request: _Request, floor: datetime | None) -> MetadataSource:
    if request.carrier == "pipe":
        return PipeSource(sys.stdout.buffer, sys.stdin.buffer)
    from garrison_agent.registry.http_source import HttpsOpener, HttpSource

    within_s = SLOW_SHARE * request.timeout_s
    return HttpSource(HttpsOpener(request.url, request.folder / SERVER_CA_FILE, floor=floor, within_s=within_s))


if __name__ == "__main__":
    sys.exit(main())
