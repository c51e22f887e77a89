"""Model families with signers of their own, as a board sees them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from garrison_agent.registry.cache import MetadataCache
from garrison_agent.registry.trust import Refresh, admit
from garrison_protocol.errors import GarrisonError, NotFoundError, RefusedError, UnavailableError
from garrison_protocol.manifest import MAX_MANIFEST_BYTES
from garrison_protocol.states import Freshness
from tests.fakes.memory_source import MemorySource
from tests.fakes.packages import Package, make_package
from tests.fakes.tuf_repository import FakeFamily, FakeRepository, in_days
from tests.unit.agent_registry.test_trust import Board

TINY = make_package("tiny", "1.0.0")
SMOL = make_package("smollm2", "1.0.0")
SMOL2 = make_package("smollm2", "2.0.0")
GEMMA = make_package("gemma", "1.0.0")


@pytest.fixture
def repository() -> FakeRepository:
    """``tiny`` is the release signers' own; the families smollm and gemma have one package each."""
    repository = FakeRepository()
    repository.add(TINY)
    for name, package in (("smollm", SMOL), ("gemma", GEMMA)):
        family = repository.delegate(name, f"models/{name}*/*/manifest.json")
        family.add(package)
    repository.publish()
    return repository


@pytest.fixture
def smollm(repository: FakeRepository) -> FakeFamily:
    return repository.families["family-smollm"]


@pytest.fixture
def board(tmp_path: Path, repository: FakeRepository) -> Board:
    return Board(tmp_path / "registry", repository, MemorySource(repository.content))


def withheld(view: Refresh, package: Package) -> GarrisonError:
    """Return why ``package`` may not be installed, though the registry as a whole is fresh."""
    with pytest.raises(GarrisonError) as caught:
        admit(view, package.ref)
    return caught.value


def families_fetched(board: Board) -> Sequence[str]:
    return [name for _, _, name in (line.partition(" ") for line in board.source.log) if "family-" in name]


def test_a_board_fetches_only_the_families_of_what_it_wants(board: Board) -> None:
    view = board.refresh(TINY.path, SMOL.path)

    assert families_fetched(board) == ["1.family-smollm.json"]
    assert view.manifests == {TINY.path: TINY.manifest_bytes, SMOL.path: SMOL.manifest_bytes}
    assert (list(view.families.values()), view.withheld) == ([1], {})
    assert next(iter(view.families)).startswith("family-smollm@")
    assert admit(view, SMOL.ref) == SMOL.manifest
    assert board.offline(TINY.path, SMOL.path) == view


def test_a_family_that_has_not_changed_is_not_fetched_again(board: Board, repository: FakeRepository) -> None:
    board.refresh(SMOL.path)
    repository.publish()
    board.source.log.clear()
    board.refresh(SMOL.path)

    assert families_fetched(board) == []
    board.refresh()
    assert board.offline(SMOL.path).manifests == {SMOL.path: SMOL.manifest_bytes}


def test_a_family_that_nobody_wants_is_let_go_when_it_changes(
    board: Board, repository: FakeRepository, smollm: FakeFamily
) -> None:
    board.refresh(SMOL.path, GEMMA.path)
    smollm.add(SMOL2)
    smollm.sign()
    repository.publish()
    view = board.refresh()

    state = MetadataCache(board.folder).load()
    assert state is not None
    assert list(state.families) == ["family-gemma"]
    assert sorted(view.families.values()) == [1, 1], "what was seen is remembered"
    assert len(list((board.folder / "targets").iterdir())) == 2, "fleet.json and gemma's manifest"
    assert board.refresh(SMOL2.path).manifests == {SMOL2.path: SMOL2.manifest_bytes}


def test_an_unreachable_registry_leaves_families_as_they_were(board: Board) -> None:
    view = board.refresh(SMOL.path)
    board.source.unreachable = True
    with pytest.raises(UnavailableError):
        board.refresh(SMOL.path)

    assert board.offline(SMOL.path) == view


def test_targets_come_before_delegates_and_fleet_is_never_theirs(
    board: Board, repository: FakeRepository, smollm: FakeFamily
) -> None:
    other = make_package("smollm2", "1.0.0", files={"model.gguf": b"other"})
    smollm.name("fleet.json", b"{}")
    smollm.sign()
    repository.add(other)
    repository.publish()
    view = board.refresh(SMOL.path)

    assert view.manifests == {SMOL.path: other.manifest_bytes}
    assert view.fleet == repository.targets["fleet.json"]
    assert families_fetched(board) == []


@pytest.mark.parametrize("fault", ["signature", "missing", "nested", "malformed", "expired", "version", "coding"])
def test_one_familys_fault_is_no_others(
    board: Board, repository: FakeRepository, smollm: FakeFamily, fault: str
) -> None:
    board.refresh(SMOL.path)
    smollm.add(SMOL2)
    if fault == "expired":
        smollm.expires = in_days(-1)
    smollm.sign(
        signers=1 if fault == "signature" else None,
        nested=repository.families["family-gemma"] if fault == "nested" else None,
    )
    if fault == "malformed":
        smollm.data = b"{"
    if fault == "coding":
        smollm.data = smollm.data.decode().encode("utf-16")
    if fault == "version":
        smollm.version += 1
    repository.publish()
    if fault == "missing":
        del repository.content.metadata["2.family-smollm.json"]
    view = board.refresh(SMOL2.path, GEMMA.path, TINY.path)

    assert view.freshness is Freshness.FRESH
    assert admit(view, GEMMA.ref) == GEMMA.manifest
    assert admit(view, TINY.ref) == TINY.manifest
    code = withheld(view, SMOL2).code
    assert (
        code
        == {
            "signature": "registry.bad_signature",
            "missing": "source.not_found",
            "nested": "registry.damaged",
            "malformed": "registry.damaged",
            "expired": "registry.expired",
            "version": "registry.rollback",
            "coding": "registry.damaged",
        }[fault]
    )


@pytest.mark.parametrize("fault", ["missing", "oversized", "changed"])
def test_a_familys_bad_target_is_no_others_fault(
    board: Board, repository: FakeRepository, smollm: FakeFamily, fault: str
) -> None:
    large = b" " * (MAX_MANIFEST_BYTES + 1)
    smollm.name(SMOL2.path, large if fault == "oversized" else SMOL2.manifest_bytes)
    smollm.sign()
    repository.publish()
    [kept] = [one for one in repository.content.targets if one[1] == SMOL2.path]
    if fault == "missing":
        del repository.content.targets[kept]
    if fault == "changed":
        repository.content.targets[kept] = b" " * len(repository.content.targets[kept])
    view = board.refresh(SMOL2.path, SMOL.path, GEMMA.path)

    assert sorted(view.manifests) == [GEMMA.path, SMOL.path]
    assert withheld(view, SMOL2).code == ("source.not_found" if fault == "missing" else "registry.damaged")


def test_a_family_that_expires_on_the_board_runs_on_but_installs_nothing(
    board: Board, repository: FakeRepository, smollm: FakeFamily
) -> None:
    smollm.expires = in_days(1)
    smollm.sign()
    repository.publish()
    board.refresh(SMOL.path, GEMMA.path)
    later: datetime = in_days(2)
    view = board.offline(SMOL.path, GEMMA.path, floor=later)

    assert view.freshness is Freshness.FRESH
    assert admit(view, GEMMA.ref) == GEMMA.manifest
    assert SMOL.path in view.manifests
    refusal = withheld(view, SMOL)
    assert (refusal.code, refusal.retryable) == ("registry.expired", True)


def test_a_familys_version_never_falls_while_its_keys_stay(
    board: Board, repository: FakeRepository, smollm: FakeFamily
) -> None:
    smollm.sign(version=7)
    repository.publish()
    view = board.refresh(SMOL.path)
    assert list(view.families.values()) == [7]
    (board.folder / "trusted.json").unlink()  # python-tuf remembers nothing, the marks do
    smollm.sign(version=6)
    repository.publish()

    lower = board.refresh(SMOL.path)
    assert withheld(lower, SMOL).code == "registry.rollback"
    assert lower.families == view.families


def test_new_keys_of_a_family_undo_versions_that_a_thief_drove_up(
    board: Board, repository: FakeRepository, smollm: FakeFamily
) -> None:
    smollm.sign(version=1_000_000)
    repository.publish()
    board.refresh(SMOL.path)
    repository.rotate("snapshot")  # or the snapshot's memory of the version holds
    replaced = repository.delegate("smollm", *smollm.paths)
    replaced.add(SMOL)
    repository.publish()
    view = board.refresh(SMOL.path)

    assert admit(view, SMOL.ref) == SMOL.manifest
    assert 1 in view.families.values()
    replaced.sign(version=2)
    repository.publish()
    board.refresh(SMOL.path)
    (board.folder / "trusted.json").unlink()
    replaced.sign(version=1)
    repository.publish()
    assert withheld(board.refresh(SMOL.path), SMOL).code == "registry.rollback"


def test_a_damaged_family_in_the_cache_is_noticed_and_replaced(board: Board) -> None:
    board.refresh(SMOL.path)
    cache = MetadataCache(board.folder)
    state = cache.load()
    assert state is not None
    cache.commit(state.model_copy(update={"families": {"family-smollm": state.families["family-smollm"] + " "}}))

    assert withheld(board.offline(SMOL.path), SMOL).code == "registry.damaged"
    assert admit(board.refresh(SMOL.path), SMOL.ref) == SMOL.manifest


def test_a_refusal_of_the_board_itself_is_no_familys_fault(board: Board) -> None:
    board.refresh()

    class Refusing(MemorySource):
        def metadata(self, name: str, max_bytes: int) -> bytes:
            if "family-" in name:
                raise RefusedError("device.revoked", "this board is revoked")
            return super().metadata(name, max_bytes)

    with pytest.raises(RefusedError) as caught:
        board.refresh(SMOL.path, source=Refusing(board.source.content))
    assert caught.value.code == "device.revoked"


def test_a_model_that_no_role_names_is_unknown(board: Board) -> None:
    view = board.refresh(SMOL2.path)

    assert view.withheld == {}
    with pytest.raises(NotFoundError) as caught:
        admit(view, SMOL2.ref)
    assert caught.value.code == "registry.target_unknown"
