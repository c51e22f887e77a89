"""The verifier as the agent runs it: a process of its own, over real HTTPS."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from garrison_agent.registry.verifier import TrustVerifier
from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError
from garrison_protocol.states import Freshness
from tests.fakes.packages import make_package
from tests.fakes.registry_server import RegistryServer, serve
from tests.fakes.tuf_repository import FakeRepository, in_days

TINY = make_package()
PAST = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass
class Rig:
    repository: FakeRepository
    server: RegistryServer
    verifier: TrustVerifier
    folder: Path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    repository = FakeRepository()
    repository.add(TINY)
    repository.publish()
    folder = tmp_path / "registry"
    with serve(repository.content, folder) as server:  # leaves its server-ca.pem where enrolment would
        (folder / "1.root.json").write_bytes(repository.bootstrap)
        yield Rig(repository, server, TrustVerifier(folder, server.url), folder)


def test_refresh_then_offline(rig: Rig) -> None:
    view = rig.verifier.refresh({}, PAST, [TINY.path])
    assert view.freshness is Freshness.FRESH
    assert view.manifests == {TINY.path: TINY.manifest_bytes}
    assert view.fleet is not None
    rig.server.status = 503
    assert rig.verifier.offline(view.high_water, view.refreshed_at, [TINY.path]) == view
    stale = rig.verifier.offline(view.high_water, view.refreshed_at, [], in_days(30))
    assert stale.freshness is Freshness.STALE
    with pytest.raises(UnavailableError) as caught:
        rig.verifier.refresh(view.high_water, PAST, [])
    assert caught.value.code == "source.unreachable"
    assert caught.value.retryable


def test_a_refusal_comes_back_as_it_was(rig: Rig) -> None:
    with pytest.raises(RefusedError) as caught:
        rig.verifier.refresh({"timestamp": 9}, PAST, [])
    assert caught.value.code == "registry.rollback"
    assert caught.value.hint
    with pytest.raises(NotFoundError, match=r"registry\.empty"):
        rig.verifier.offline({}, 0, [])


def test_a_board_that_is_not_enrolled(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"registry\.not_enrolled"):
        TrustVerifier(tmp_path, "https://127.0.0.1:1").refresh({}, PAST, [])


def test_a_verifier_that_dies_is_an_error_not_a_hang(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnavailableError, match=r"registry\.verifier_failed.*status 1"):
        rig.verifier.refresh({}, PAST, [])


def test_a_controller_that_hangs_is_given_up(rig: Rig) -> None:
    rig.server.hold = ("timestamp.json", 0)
    with pytest.raises(UnavailableError, match="did not answer within 1 s"):
        TrustVerifier(rig.folder, rig.server.url, timeout_s=1).refresh({}, PAST, [])


def test_importing_it_does_not_load_python_tuf() -> None:
    code = (
        "import sys, garrison_agent.registry.verifier, garrison_agent.registry.trust, garrison_agent.registry.download,"
        "garrison_agent.registry.http_source\n"
        "print([n for n in ('tuf', 'securesystemslib', 'urllib3', 'http.client', 'httpx') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
