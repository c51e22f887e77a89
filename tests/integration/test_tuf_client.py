"""python-tuf's own client, unmodified, against a real controller over HTTPS: it finds what an agent finds."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tuf.ngclient import Updater

from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_agent.registry.trust import Refresh, refresh
from garrison_protocol.manifest import target_path
from tests.integration.releases import Release, published_release

pytestmark = pytest.mark.integration

MODELS = ("smollm2", "gemma", "tiny")
PATHS = [target_path(name, "1.0.0") for name in MODELS]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    with published_release(tmp_path_factory.mktemp("release")) as release:
        yield release


def first_root(release: Release) -> bytes:
    with release.served.board_http() as http:
        return http.get("/device/v1/metadata/1.root.json").content


def by_python_tuf(release: Release, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Return the targets that python-tuf finds and downloads with its own transport, by path."""
    monkeypatch.setenv("SSL_CERT_FILE", str(release.served.ca))
    folder.mkdir()
    updater = Updater(
        str(folder),
        f"{release.served.url}/device/v1/metadata/",
        str(folder),
        f"{release.served.url}/device/v1/targets/",
        bootstrap=first_root(release),
    )
    found = {}
    for path in (*PATHS, "fleet.json"):
        target = updater.get_targetinfo(path)
        if target is not None:
            found[path] = Path(updater.download_target(target)).read_bytes()
    return found


def by_agent(release: Release, folder: Path) -> Refresh:
    source = HttpSource(HttpsOpener(release.served.url, release.served.ca))
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return refresh(source, folder, bootstrap=first_root(release), high_water={}, floor=start, want=PATHS)


def publish(release: Release, *names: str, signers: tuple[str, ...]) -> None:
    packages = [release.pack(name, "1.0.0", name.encode() * 500) for name in names]
    release.run("model", "add", *packages, "--workspace", release.workspace)
    for signer in signers:
        release.sign(signer)
    release.run("model", "publish", *packages, "--workspace", release.workspace)


def test_flat_and_delegated_targets_are_those_that_an_agent_finds(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(release, "tiny", signers=("dan", "erin"))
    flat, view = by_python_tuf(release, tmp_path / "flat", monkeypatch), by_agent(release, tmp_path / "board")
    assert list(flat) == [PATHS[2], "fleet.json"]
    assert flat == {**view.manifests, "fleet.json": view.fleet}

    for name in ("gina", "hugo"):
        release.run("registry", "key", "generate", name, "--out", str(release.folder / "keys"))
    keys = [word for name in ("gina", "hugo") for word in ("--key", release.public(name))]
    for name, path in (("smollm", "models/smollm*/*/manifest.json"), ("gemma", "models/gemma/*/manifest.json")):
        words = ("registry", "delegate", "add", name, "--path", path, *keys, "--workspace", release.workspace)
        assert release.run(*words)["roles"] == ["targets", f"family-{name}"]
    publish(release, "smollm2", "gemma", signers=("dan", "erin", "gina", "hugo"))
    delegated = by_python_tuf(release, tmp_path / "delegated", monkeypatch)
    view = by_agent(release, tmp_path / "board")

    assert list(delegated) == [*PATHS, "fleet.json"]
    assert delegated == {**view.manifests, "fleet.json": view.fleet}
    assert (view.withheld, len(view.families)) == ({}, 2)
    listed = release.run("registry", "delegate", "list", "--workspace", release.workspace)["delegations"]
    assert [(one["role"], one["packages"], one["threshold"]) for one in listed] == [
        ("family-gemma", 1, 2),
        ("family-smollm", 1, 2),
    ]
    assert set(release.run("registry", "status")["families"]) == {"family-gemma", "family-smollm"}
    taken = release.run("registry", "delegate", "remove", "gemma", "--workspace", release.workspace)
    assert taken["packages"] == [PATHS[1]]
    for signer in ("dan", "erin"):
        release.sign(signer)
    release.run("registry", "push", "--workspace", release.workspace)
    assert by_python_tuf(release, tmp_path / "taken", monkeypatch) == delegated
    assert by_agent(release, tmp_path / "board").manifests == view.manifests
    table, _ = release.text("registry", "delegate", "list", "--workspace", release.workspace)
    assert "2 of 2: gina, hugo" in table
    table, _ = release.text("registry", "status")
    assert "family-smollm" in table
