from __future__ import annotations

import fcntl
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Timestamp

from garrison_controller.access import queries as access_queries
from garrison_controller.registry import queries
from garrison_controller.registry.rules import Upload
from garrison_controller.registry.store import RegistryStore
from garrison_controller.signing.keys import load_public
from garrison_controller.signing.metadata import parse_targets, to_bytes
from garrison_controller.signing.packing import Package
from garrison_protocol.errors import GarrisonError, NotFoundError
from tests.fakes.ceremony import NOW, Ceremony, later, make_ceremony, make_package, make_signer
from tests.fakes.published import PublishedRegistry, upload_of

PATH = "models/tiny/1.0.0/manifest.json"


def add(ceremony: Ceremony, registry: PublishedRegistry, package: Package) -> None:
    ceremony.workspace.add_package(package, days=365, now=NOW)
    registry.upload_blobs(package)


def refusal(registry: PublishedRegistry, upload: Upload, now: datetime = NOW) -> GarrisonError:
    """Push, see it refused, and see that nothing changed."""
    before = {path: path.read_bytes() for path in registry.folder.rglob("*.json")}
    notices = len(registry.notices)
    with pytest.raises(GarrisonError) as caught:
        registry.registry.accept_metadata(upload, "id-anna", "anna", now)
    assert {path: path.read_bytes() for path in registry.folder.rglob("*.json")} == before
    assert len(registry.notices) == notices
    return caught.value


def test_python_tufs_own_client_accepts_what_is_published(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path)
    add(ceremony, published, package)
    ceremony.sign("dan", "erin")
    publication = published.push()

    assert (publication.root, publication.targets, publication.snapshot, publication.timestamp) == (1, 2, 2, 2)
    updater = published.updater(tmp_path / "cache")
    updater.refresh()
    target = updater.get_targetinfo(PATH)
    assert target is not None
    assert Path(updater.download_target(target)).read_bytes() == package.manifest_bytes
    fleet = updater.get_targetinfo("fleet.json")
    assert fleet is not None
    assert Path(updater.download_target(fleet)).read_bytes().startswith(b"{")


def test_a_publication_is_recorded_with_its_publisher(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path)
    add(ceremony, published, package)
    ceremony.sign("dan", "erin")
    published.push()

    with published.database.reading() as session:
        row = queries.get_package(session, "tiny", "1.0.0")
        assert (row.published_by, row.published_by_name, row.alias) == ("id-anna", "anna", "chat")
        assert row.manifest.encode() == package.manifest_bytes
        assert (row.manifest_sha256, row.published_at) == (package.manifest_sha256, NOW)
        events = [(one.principal, one.action, one.subject) for one in access_queries.events(session)]
    assert events[-2:] == [("anna", "model.publish", "tiny:1.0.0"), ("anna", "registry.publish", "metadata")]
    assert published.notices[-1] == published.registry.current_timestamp()
    assert published.registry.get_fleet().name == "demo"


@pytest.mark.parametrize("signers", [(), ("dan",), ("erin",)])
def test_half_signed_targets_are_refused(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path, signers: tuple[str, ...]
) -> None:
    add(ceremony, published, make_package(tmp_path))
    ceremony.sign(*signers)

    error = refusal(published, upload_of(ceremony.workspace))
    assert (error.code, error.exit_status, error.fields["signed"]) == ("registry.threshold_unmet", 6, len(signers))


def test_a_signature_of_another_version_does_not_count(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    add(ceremony, published, make_package(tmp_path))
    ceremony.sign("dan", "erin")
    upload = upload_of(ceremony.workspace)
    assert upload.targets is not None
    targets = parse_targets(upload.targets)
    targets.signed.expires += timedelta(days=1)

    assert refusal(published, replace(upload, targets=to_bytes(targets))).code == "registry.threshold_unmet"


def test_root_signed_by_one_of_three_is_refused(ceremony: Ceremony, empty: PublishedRegistry) -> None:
    ceremony.sign("alice", "dan", "erin")

    assert refusal(empty, upload_of(ceremony.workspace)).code == "registry.threshold_unmet"
    assert empty.registry.current_timestamp() is None
    with pytest.raises(NotFoundError):
        empty.registry.first_root()


def test_the_same_push_again_changes_nothing(ceremony: Ceremony, empty: PublishedRegistry) -> None:
    ceremony.sign("alice", "bob", "dan", "erin")
    upload = upload_of(ceremony.workspace)
    first = empty.registry.accept_metadata(upload, "id-anna", "anna", NOW)
    second = empty.registry.accept_metadata(upload, "id-otto", "otto", NOW)

    assert (first.unchanged, second.unchanged) == (False, True)
    assert second.timestamp == 1
    assert len(empty.notices) == 1


def test_older_and_skipped_versions_are_refused(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    old = (published.folder / "1.targets.json").read_bytes()
    add(ceremony, published, make_package(tmp_path))
    ceremony.sign("dan", "erin")
    published.push()

    replayed = refusal(published, Upload(targets=old))
    assert (replayed.code, replayed.fields["current"]) == ("registry.version_not_next", 2)
    ahead = parse_targets((published.folder / "2.targets.json").read_bytes())
    ahead.signed.version = 4
    ahead.sign(ceremony.signers["dan"])
    ahead.sign(ceremony.signers["erin"], append=True)
    assert refusal(published, Upload(targets=to_bytes(ahead))).code == "registry.version_not_next"


def test_packages_without_their_blobs_are_refused(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    ceremony.sign("dan", "erin")

    error = refusal(published, upload_of(ceremony.workspace))
    assert (error.code, error.fields["count"]) == ("registry.blobs_missing", 2)
    published.upload_blobs(package)
    assert published.push().packages == ("tiny:1.0.0",)


def test_the_manifest_must_come_along_unchanged(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path)
    add(ceremony, published, package)
    ceremony.sign("dan", "erin")
    upload = upload_of(ceremony.workspace)

    assert refusal(published, replace(upload, files={})).code == "registry.target_missing"
    tampered = package.manifest_bytes.replace(b"Apache-2.0", b"Elsewhere1")
    assert refusal(published, replace(upload, files={PATH: tampered})).code == "registry.target_changed"


def test_a_version_never_gets_other_content(ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path) -> None:
    add(ceremony, published, make_package(tmp_path))
    ceremony.sign("dan", "erin")
    published.push()
    other = make_package(tmp_path / "2", content=b"other")
    published.upload_blobs(other)
    workspace = ceremony.workspace
    workspace._change_targets({PATH: other.manifest_bytes}, days=365, now=NOW)
    ceremony.sign("dan", "erin")

    assert refusal(published, upload_of(workspace)).code == "registry.version_reused"


def test_published_targets_are_never_dropped(ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path) -> None:
    add(ceremony, published, make_package(tmp_path))
    ceremony.sign("dan", "erin")
    published.push()
    targets = parse_targets((published.folder / "2.targets.json").read_bytes())
    del targets.signed.targets[PATH]
    targets.signed.version = 3
    targets.sign(ceremony.signers["dan"])
    targets.sign(ceremony.signers["erin"], append=True)

    assert refusal(published, Upload(targets=to_bytes(targets))).code == "registry.target_removed"


def test_targets_elsewhere_than_models_are_refused(ceremony: Ceremony, published: PublishedRegistry) -> None:
    ceremony.workspace._change_targets({"../evil.json": b"{}"}, days=365, now=NOW)
    ceremony.sign("dan", "erin")

    assert refusal(published, upload_of(ceremony.workspace)).code == "registry.target_path"


def test_expired_metadata_is_refused(ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path) -> None:
    add(ceremony, published, make_package(tmp_path))
    ceremony.sign("dan", "erin")

    assert refusal(published, upload_of(ceremony.workspace), later(days=366)).code == "registry.metadata_expired"


def test_a_root_for_another_controller_is_refused(ceremony: Ceremony, tmp_path: Path) -> None:
    ceremony.sign("alice", "bob", "dan", "erin")
    (tmp_path / "other").mkdir()
    stranger = PublishedRegistry(make_ceremony(tmp_path / "other"))
    assert refusal(stranger, upload_of(ceremony.workspace)).code == "registry.online_keys_not_delegated"
    stranger.close()


def test_a_fleet_that_forgets_the_controllers_keys_is_refused(ceremony: Ceremony, published: PublishedRegistry) -> None:
    fleet = ceremony.workspace.fleet()
    forgotten = fleet.model_copy(update={"keys": fleet.keys[1:]})
    ceremony.workspace._change_targets({"fleet.json": forgotten.model_dump_json().encode()}, days=365, now=NOW)
    ceremony.sign("dan", "erin")

    assert refusal(published, upload_of(ceremony.workspace)).code == "registry.fleet_lacks_keys"


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"signed": {"_type": "root"}}', b"[" * 100_000])
def test_damaged_metadata_is_refused(published: PublishedRegistry, data: bytes) -> None:
    assert refusal(published, Upload(targets=data)).code == "registry.metadata_malformed"
    assert refusal(published, Upload(roots=(data,))).code == "registry.metadata_malformed"


def test_metadata_of_another_role_is_refused(published: PublishedRegistry) -> None:
    root = (published.folder / "1.root.json").read_bytes()
    assert refusal(published, Upload(targets=root)).code == "registry.metadata_malformed"
    assert refusal(published, Upload()).code == "registry.upload_empty"


def test_a_rotated_root_is_followed_by_clients(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    published.updater(tmp_path / "cache").refresh()
    make_signer(tmp_path / "keys", "frank")
    ceremony.workspace.rotate_root(
        add=[("root", load_public(tmp_path / "keys" / "frank.pub.json"))],
        remove=[("root", "carol")],
        thresholds={},
        days=365,
        now=NOW,
    )
    ceremony.sign("alice", "bob")
    assert published.push().root == 2

    updater = published.updater(tmp_path / "cache")
    updater.refresh()
    assert (published.folder / "1.root.json").is_file()
    assert b'"version":2' in (tmp_path / "cache" / "root.json").read_bytes()


def test_a_root_that_drops_a_release_signer_needs_the_targets_again(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path
) -> None:
    frank = make_signer(tmp_path / "keys", "frank")
    ceremony.workspace.rotate_root(
        add=[("targets", load_public(tmp_path / "keys" / "frank.pub.json"))],
        remove=[("targets", "erin")],
        thresholds={},
        days=365,
        now=NOW,
    )
    ceremony.sign("alice", "bob", "dan")
    ceremony.workspace.sign(frank)
    upload = upload_of(ceremony.workspace)

    assert refusal(published, replace(upload, targets=None)).code == "registry.threshold_unmet"
    published.push()
    published.updater(tmp_path / "cache").refresh()


def test_the_timestamp_is_signed_again_when_due_and_the_snapshot_stays(
    published: PublishedRegistry, tmp_path: Path
) -> None:
    registry = published.registry
    assert not registry.refresh_online(later(hours=23))
    assert registry.refresh_online(later(days=1))

    stamp = Metadata[Timestamp].from_bytes(published.notices[-1])
    assert (stamp.signed.version, stamp.signed.snapshot_meta.version) == (2, 1)
    assert stamp.signed.expires == later(days=8)
    published.updater(tmp_path / "cache").refresh()
    assert not registry.refresh_online(later(days=1, hours=1))


def test_the_snapshot_is_signed_again_before_it_expires(published: PublishedRegistry, tmp_path: Path) -> None:
    assert published.registry.refresh_online(later(days=16))

    stamp = Metadata[Timestamp].from_bytes(published.notices[-1])
    assert (stamp.signed.version, stamp.signed.snapshot_meta.version) == (2, 2)
    published.updater(tmp_path / "cache").refresh()


def test_an_empty_registry_has_nothing_to_refresh(empty: PublishedRegistry) -> None:
    assert not empty.registry.refresh_online(NOW)
    with pytest.raises(NotFoundError) as caught:
        empty.registry.get_fleet()
    assert caught.value.code == "registry.empty"


class PowerCutError(Exception):
    """Stands for the process ending at this point."""


@pytest.mark.parametrize("step", ["write_target", "write_metadata", "write_root", "write_timestamp"])
def test_a_push_cut_short_leaves_the_old_version_and_completes_when_repeated(
    ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    make_signer(tmp_path / "keys", "frank")
    add(ceremony, published, make_package(tmp_path))
    ceremony.workspace.rotate_root(
        add=[("root", load_public(tmp_path / "keys" / "frank.pub.json"))], remove=[], thresholds={}, days=365, now=NOW
    )
    ceremony.sign("alice", "bob", "dan", "erin")

    def cut(*_: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(RegistryStore, step, cut)
        with pytest.raises(PowerCutError):
            published.registry.accept_metadata(upload_of(ceremony.workspace), "id-anna", "anna", NOW)
    assert len(published.notices) == 1
    old = published.updater(tmp_path / "before")
    old.refresh()
    assert old.get_targetinfo(PATH) is None

    assert published.push().targets == 2
    new = published.updater(tmp_path / "before")
    assert new.get_targetinfo(PATH) is not None
    with published.database.reading() as session:
        assert len(queries.packages(session)) == 1


def test_an_unknown_model_is_not_found(published: PublishedRegistry) -> None:
    with published.database.reading() as session, pytest.raises(NotFoundError) as caught:
        queries.get_package(session, "tiny", "9")
    assert caught.value.code == "model.not_found"


def test_notices_leave_in_the_order_of_publication(published: PublishedRegistry) -> None:
    def locked(_timestamp: bytes) -> None:
        with pytest.raises(BlockingIOError), (published.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        calls.append("locked")

    calls: list[str] = []
    published.registry.on_timestamp = locked
    assert published.registry.refresh_online(NOW + timedelta(days=2))
    assert calls == ["locked"]
