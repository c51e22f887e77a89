from __future__ import annotations

from pathlib import Path

import pytest

from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError, NotFoundError
from tests.fakes.published import PublishedRegistry


def test_published_files_are_found_by_their_tuf_names(published: PublishedRegistry) -> None:
    store = published.registry.store
    for name in ("timestamp.json", "1.root.json", "1.targets.json", "1.snapshot.json"):
        assert store.metadata_path(name).is_file()
    fleet = next(published.folder.glob("targets/*.fleet.json")).read_bytes()
    assert store.target_path(sha256_hex(fleet), "fleet.json").read_bytes() == fleet


@pytest.mark.parametrize(
    "name", ["2.root.json", "root.json", "0.root.json", "../controller.db", ".lock", "targets", "", "1.root.json/"]
)
def test_other_names_are_not_found(published: PublishedRegistry, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        published.registry.store.metadata_path(name)
    assert caught.value.code == "registry.metadata_not_found"


@pytest.mark.parametrize("path", ["other.json", "../1.root.json", "../../controller.db", "/etc/passwd", ""])
def test_targets_stay_inside_their_folder(published: PublishedRegistry, path: str) -> None:
    (published.folder / f"{'0' * 64}.outside").write_text("outside")
    for asked in (path, "../outside"):
        with pytest.raises(NotFoundError) as caught:
            published.registry.store.target_path("0" * 64, asked)
        assert caught.value.code == "registry.target_not_found"


def test_a_damaged_repository_is_named(published: PublishedRegistry) -> None:
    Path(published.folder / "1.snapshot.json").write_bytes(b"")
    with pytest.raises(GarrisonError) as caught:
        published.registry.store.published()
    assert caught.value.code == "registry.store_damaged"
