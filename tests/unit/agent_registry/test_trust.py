"""Attacks, rotations, and outages against a registry signed with real keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from garrison_agent.registry.cache import MetadataCache
from garrison_agent.registry.files import write_atomic
from garrison_agent.registry.trust import Refresh, admit, offline, refresh
from garrison_protocol.errors import GarrisonError, NotFoundError, RefusedError, UnavailableError
from garrison_protocol.fleet import parse_fleet
from garrison_protocol.states import Freshness
from tests.fakes.memory_source import MemorySource
from tests.fakes.packages import make_package
from tests.fakes.tuf_repository import FakeRepository, in_days

TINY = make_package("tiny", "1.0.0")
TINY2 = make_package("tiny", "2.0.0")
PAST = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass
class Board:
    """One board: its cache, its marks, and what it pinned."""

    folder: Path
    repository: FakeRepository
    source: MemorySource
    high_water: dict[str, int] = field(default_factory=dict)
    trusted_at: int = 0

    def refresh(self, *want: str, floor: datetime = PAST, source: MemorySource | None = None) -> Refresh:
        view = refresh(
            source or self.source,
            self.folder,
            bootstrap=self.repository.bootstrap,
            high_water=self.high_water,
            floor=floor,
            want=want,
        )
        self.high_water, self.trusted_at = view.high_water, view.refreshed_at
        return view

    def offline(self, *want: str, floor: datetime | None = None) -> Refresh:
        return offline(
            self.folder,
            bootstrap=self.repository.bootstrap,
            high_water=self.high_water,
            trusted_at=self.trusted_at,
            want=want,
            floor=floor,
        )

    def refused(self, code: str, *, floor: datetime = PAST, want: Sequence[str] = ()) -> None:
        """Assert that a refresh is refused so, and that the last good state still stands."""
        before = self.high_water, self.trusted_at
        with pytest.raises(GarrisonError) as caught:
            self.refresh(*want, floor=floor)
        assert caught.value.code == code
        assert caught.value.hint
        assert (self.high_water, self.trusted_at) == before
        if self.trusted_at:
            assert self.offline().high_water == self.high_water


@pytest.fixture
def repository() -> FakeRepository:
    return FakeRepository()


@pytest.fixture
def board(tmp_path: Path, repository: FakeRepository) -> Board:
    return Board(tmp_path / "registry", repository, MemorySource(repository.content))


def test_a_first_refresh_gives_fleet_and_wanted_manifests(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.publish()
    view = board.refresh(TINY.path, TINY2.path)
    assert view.freshness is Freshness.FRESH
    assert view.high_water == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}
    assert view.manifests == {TINY.path: TINY.manifest_bytes}
    assert view.fleet is not None
    assert parse_fleet(view.fleet).keys[0].public == repository.director.public_hex
    assert abs(view.refreshed_at - datetime.now(UTC).timestamp()) < 60
    assert board.offline(TINY.path) == view


def test_what_has_not_changed_is_not_fetched_again(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.publish()
    board.refresh(TINY.path)
    state = board.folder / "trusted.json"
    inode = state.stat().st_ino
    board.source.log.clear()
    board.refresh(TINY.path)
    assert board.source.log == ["metadata 2.root.json", "metadata timestamp.json"]
    assert state.stat().st_ino == inode
    repository.refresh_timestamp()
    assert board.refresh(TINY.path).timestamp == 3
    assert state.stat().st_ino != inode


def test_rotations_of_every_role_are_followed_over_months(board: Board, repository: FakeRepository) -> None:
    board.refresh()
    repository.expires["root"] = in_days(-10)
    for role in ("root", "timestamp", "targets"):
        repository.rotate(role)  # intermediate roots may have expired
    repository.expires["root"] = in_days(365)
    for role in ("root", "root", "snapshot"):
        repository.rotate(role)
    repository.add(TINY)
    repository.publish()
    assert board.refresh(TINY.path).root == 7
    assert sorted(path.name for path in (board.folder / "roots").iterdir()) == [
        f"{version}.root.json" for version in range(1, 8)
    ]
    assert board.offline(TINY.path).manifests == {TINY.path: TINY.manifest_bytes}
    board.source.log.clear()
    board.refresh()
    assert board.source.log[0] == "metadata 8.root.json"


def test_a_root_by_too_few_keys_is_refused(board: Board, repository: FakeRepository) -> None:
    board.refresh()
    repository.rotate("root", signers=1)
    board.refused("registry.bad_signature")


def test_one_of_two_release_signers_is_not_enough(board: Board, repository: FakeRepository) -> None:
    board.refresh()
    repository.add(TINY)
    repository.publish(targets_signers=1)  # with all online keys in the thief's hands
    board.refused("registry.bad_signature", want=[TINY.path])


def test_a_stranger_cannot_sign_the_timestamp(board: Board, repository: FakeRepository) -> None:
    board.refresh()
    repository.signers["timestamp"] = [CryptoSigner.generate_ed25519()]
    repository.publish()
    board.refused("registry.bad_signature")


def test_a_rotated_out_key_counts_no_more_even_after_a_failed_refresh(board: Board, repository: FakeRepository) -> None:
    board.refresh()
    old = list(repository.signers["timestamp"])
    repository.rotate("timestamp")
    repository.signers["timestamp"] = old
    repository.publish()
    board.refused("registry.bad_signature")
    del repository.content.metadata["2.root.json"]  # whoever withholds it now comes too late
    board.refused("registry.bad_signature")


def test_old_metadata_is_refused(board: Board, repository: FakeRepository) -> None:
    old = dict(repository.content.metadata)
    repository.publish()
    board.refresh()
    repository.content.metadata = old
    board.refused("registry.rollback")


def test_old_metadata_is_refused_when_the_cache_was_lost(board: Board, repository: FakeRepository) -> None:
    old = dict(repository.content.metadata)
    repository.publish()
    board.refresh()
    repository.content.metadata = old
    shutil.rmtree(board.folder)
    with pytest.raises(RefusedError, match=r"registry\.rollback"):
        board.refresh()


def test_a_withheld_root_is_noticed_when_the_cache_was_lost(board: Board, repository: FakeRepository) -> None:
    repository.rotate("root")
    board.refresh()
    shutil.rmtree(board.folder)
    del repository.content.metadata["2.root.json"]
    with pytest.raises(RefusedError, match=r"registry\.rollback"):
        board.refresh()


def test_an_old_cache_put_back_is_refused_offline(board: Board, repository: FakeRepository) -> None:
    board.refresh()
    old = (board.folder / "trusted.json").read_bytes()
    repository.publish()
    board.refresh()
    write_atomic(board.folder / "trusted.json", old)
    with pytest.raises(RefusedError, match=r"registry\.rollback"):
        board.offline()


def test_new_online_keys_recover_from_versions_driven_up(board: Board, repository: FakeRepository) -> None:
    repository.publish(versions={"timestamp": 2_000_000, "snapshot": 2_000_000})
    board.refresh()
    repository.rotate("timestamp")
    repository.rotate("snapshot")
    repository.publish(versions={"timestamp": 3, "snapshot": 3})
    view = board.refresh()
    assert (view.root, view.timestamp, view.snapshot) == (3, 3, 3)
    assert board.offline() == view


def test_new_online_keys_do_not_excuse_older_targets(board: Board, repository: FakeRepository) -> None:
    repository.publish(versions={"targets": 9})
    board.refresh()
    repository.rotate("snapshot")
    repository.publish(versions={"targets": 8})
    board.refused("registry.rollback")


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_expired_metadata_is_refused(board: Board, repository: FakeRepository, role: str) -> None:
    board.refresh()
    repository.expires[role] = in_days(-1)
    if role == "root":
        repository.rotate("root")
    repository.publish()
    board.refused("registry.expired")


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_a_clock_behind_the_floor_does_not_excuse_expiry(board: Board, repository: FakeRepository, role: str) -> None:
    repository.expires |= dict.fromkeys(repository.expires, in_days(100))
    repository.expires[role] = in_days(10)
    repository.rotate("root")
    repository.publish()
    board.refused("registry.expired", floor=in_days(11))
    assert not (board.folder / "trusted.json").exists()
    view = board.refresh(floor=in_days(9))
    assert abs(view.refreshed_at - in_days(9).timestamp()) < 60


def test_offline_after_expiry_is_stale_and_still_verified(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.publish()
    board.refresh(TINY.path)
    assert board.offline(floor=in_days(6)).freshness is Freshness.FRESH
    months_later = board.offline(TINY.path, floor=in_days(240))
    assert months_later.freshness is Freshness.STALE
    assert months_later.manifests == {TINY.path: TINY.manifest_bytes}
    with pytest.raises(RefusedError, match=r"registry\.stale"):
        admit(months_later, TINY.ref)


def test_offline_does_not_wait_for_a_refresh_that_hangs(board: Board) -> None:
    view = board.refresh()
    with MetadataCache(board.folder).lock():
        assert board.offline() == view


def test_offline_at_a_time_when_it_was_not_valid_is_refused(board: Board) -> None:
    board.refresh()
    board.trusted_at = int(in_days(8).timestamp())
    with pytest.raises(RefusedError, match=r"registry\.expired"):
        board.offline()


def test_a_board_that_never_refreshed_says_so(board: Board) -> None:
    with pytest.raises(NotFoundError, match=r"registry\.empty"):
        board.offline()


def test_no_network_leaves_the_kept_state(board: Board) -> None:
    board.refresh()
    board.source.unreachable = True
    board.refused("source.unreachable")


def test_a_registry_without_metadata_is_not_found(board: Board, repository: FakeRepository) -> None:
    del repository.content.metadata["timestamp.json"]
    board.refused("source.not_found")


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "endless", "deep"])
def test_damaged_metadata_from_the_controller_is_refused(
    board: Board, repository: FakeRepository, name: str, how: str
) -> None:
    board.refresh()
    repository.publish()
    data = repository.content.metadata[name]
    middle = len(data) // 2
    repository.content.metadata[name] = {
        "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "cut": data[:middle],
        "empty": b"",
        "endless": data + b" " * 6_000_000,
        "deep": b"[" * min(len(data), 16000),
    }[how]
    with pytest.raises(RefusedError) as caught:
        board.refresh()
    assert caught.value.code in {"registry.damaged", "registry.bad_signature", "source.too_long"}
    assert board.offline().timestamp == 1


def test_mixed_versions_are_refused(board: Board, repository: FakeRepository) -> None:
    repository.publish()
    content = repository.content.metadata
    content["2.targets.json"] = content["1.targets.json"]
    board.refused("registry.damaged")


def test_a_timestamp_cannot_pass_for_a_snapshot(board: Board, repository: FakeRepository) -> None:
    board.refresh()
    state = json.loads((board.folder / "trusted.json").read_bytes())
    state["snapshot"] = state["timestamp"]
    write_atomic(board.folder / "trusted.json", json.dumps(state).encode())
    with pytest.raises(RefusedError, match=r"registry\.damaged"):
        board.offline()


@pytest.mark.parametrize("damage", [b"", b"\0" * 500, b"{}"])
def test_a_cache_damaged_by_a_power_cut_heals_with_the_next_refresh(board: Board, damage: bytes) -> None:
    view = board.refresh()
    (board.folder / "trusted.json").write_bytes(damage)
    with pytest.raises(RefusedError, match=r"registry\.damaged"):
        board.offline()
    assert board.refresh().high_water == view.high_water
    assert board.offline().high_water == view.high_water


def test_a_damaged_root_heals_with_the_next_refresh(board: Board, repository: FakeRepository) -> None:
    repository.rotate("root")
    view = board.refresh()
    (board.folder / "roots" / "2.root.json").write_bytes(b"")
    with pytest.raises(RefusedError, match=r"registry\.damaged"):
        board.offline()
    board.refresh()
    assert board.offline().high_water == view.high_water


def test_damaged_kept_targets_heal_with_the_next_refresh(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.publish()
    view = board.refresh(TINY.path)
    for path in (board.folder / "targets").iterdir():
        path.write_bytes(b"\0" * 10)
    with pytest.raises(RefusedError, match=r"registry\.damaged"):
        board.offline()
    assert board.refresh(TINY.path) == Refresh(**{**view.__dict__, "refreshed_at": board.trusted_at})


def test_a_wrong_target_from_the_controller_is_refused(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.publish()
    for key in repository.content.targets:
        if key[1] == TINY.path:
            repository.content.targets[key] = TINY.manifest_bytes.replace(b"tiny", b"tony")
    with pytest.raises(RefusedError, match=r"registry\.damaged"):
        board.refresh(TINY.path)


def test_manifests_no_longer_in_the_registry_are_dropped(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.publish()
    board.refresh(TINY.path)
    del repository.targets[TINY.path]
    repository.publish()
    assert board.refresh(TINY.path).manifests == {}
    assert len(list((board.folder / "targets").iterdir())) == 1


def test_a_crash_in_the_middle_leaves_the_old_state_and_no_litter(
    board: Board, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = board.refresh()
    left_over = board.folder / "incoming-left"
    left_over.mkdir()
    (left_over / "timestamp.json").write_bytes(b"half")
    repository.publish()
    del repository.content.metadata["2.targets.json"]
    board.refused("source.not_found")
    assert board.offline().high_water == view.high_water
    assert not list(board.folder.glob("incoming-*"))


def test_admit_takes_exactly_what_was_signed(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.publish()
    view = board.refresh(TINY.path)
    assert admit(view, TINY.ref) == TINY.manifest
    with pytest.raises(NotFoundError, match=r"registry\.target_unknown"):
        admit(view, TINY2.ref)
    with pytest.raises(RefusedError, match=r"registry\.manifest_mismatch"):
        admit(view, TINY.ref.model_copy(update={"manifest_sha256": "0" * 64}))


def test_admit_refuses_below_the_floor(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.add(TINY2)
    repository.set_fleet(floors={"tiny": "1.5"})
    repository.publish()
    view = board.refresh(TINY.path, TINY2.path)
    with pytest.raises(RefusedError, match=r"registry\.below_floor"):
        admit(view, TINY.ref)
    assert admit(view, TINY2.ref) == TINY2.manifest


def test_admit_refuses_a_manifest_under_anothers_name(board: Board, repository: FakeRepository) -> None:
    repository.add(TINY)
    repository.targets[TINY2.path] = TINY.manifest_bytes
    repository.publish()
    view = board.refresh(TINY2.path)
    with pytest.raises(RefusedError, match="says it is"):
        admit(view, TINY.ref.model_copy(update={"version": "2.0.0"}))


def test_nothing_but_our_errors_when_the_disk_fails(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.folder.parent.mkdir(parents=True, exist_ok=True)
    board.folder.write_bytes(b"a file where the folder should be")
    with pytest.raises(UnavailableError, match=r"disk\.failed"):
        board.refresh()
