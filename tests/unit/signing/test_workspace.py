from __future__ import annotations

from pathlib import Path

import pytest

from garrison_controller.signing.keys import load_public
from garrison_controller.signing.metadata import parse_root, parse_targets, to_bytes
from garrison_controller.signing.review import Review, review
from garrison_controller.signing.workspace import RoleKeys, Workspace
from garrison_protocol.errors import ConflictError, GarrisonError, RefusedError
from garrison_protocol.states import KeyPurpose
from tests.fakes.ceremony import NOW, Ceremony, later, make_ceremony, make_package, make_signer


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    return make_ceremony(tmp_path)


def publish(ceremony: Ceremony) -> None:
    """Record everything pending as published, as a push does."""
    for role, data in ceremony.workspace.completed().items():
        version = parse_root(data).signed.version if role == "root" else parse_targets(data).signed.version
        ceremony.workspace.record_published(role, version, data)


def first_version(ceremony: Ceremony) -> None:
    ceremony.sign("alice", "bob", "dan", "erin")
    publish(ceremony)


def one(reviews: list[Review], role: str) -> Review:
    (found,) = [each for each in reviews if each.role == role]
    return found


def test_a_new_registry_waits_for_every_threshold(ceremony: Ceremony) -> None:
    workspace = ceremony.workspace
    reviews = review(workspace, NOW)
    assert [(each.role, each.version, each.complete) for each in reviews] == [("root", 1, False), ("targets", 1, False)]

    ceremony.sign("alice", "dan")
    with pytest.raises(RefusedError) as caught:
        workspace.completed()
    assert (caught.value.code, caught.value.fields["signed"]) == ("registry.threshold_unmet", 1)

    ceremony.sign("carol", "erin")
    assert set(workspace.completed()) == {"root", "targets"}
    root = one(review(workspace, NOW), "root")
    assert root.progress[0].signed == ("alice", "carol")
    assert root.progress[0].unsigned == ("bob",)


def test_signing_twice_changes_nothing(ceremony: Ceremony) -> None:
    workspace = ceremony.workspace
    assert [(each.role, each.new) for each in workspace.sign(ceremony.signers["alice"])] == [("root", True)]
    before = sorted((path.name, path.read_bytes()) for path in (workspace.folder / "pending").iterdir())

    assert [(each.role, each.new) for each in workspace.sign(ceremony.signers["alice"])] == [("root", False)]
    assert sorted((path.name, path.read_bytes()) for path in (workspace.folder / "pending").iterdir()) == before


def test_a_stranger_signs_nothing(ceremony: Ceremony, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        ceremony.workspace.sign(make_signer(tmp_path / "more", "mallory"))
    assert caught.value.code == "signing.key_has_no_role"


def test_the_review_says_what_a_package_is(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    package = make_package(tmp_path)
    assert ceremony.workspace.add_package(package, days=365, now=NOW)

    (pending,) = review(ceremony.workspace, NOW)
    (change,) = pending.changes
    assert (pending.role, pending.version, change.kind, change.subject) == ("targets", 2, "added", "model tiny:1.0.0")
    assert change.facts["manifest_sha256"] == package.manifest_sha256
    assert change.facts["license"] == "Apache-2.0"
    assert change.facts["size_bytes"] == package.manifest.variants[0].size_bytes
    assert package.manifest.variants[0].files[0].sha256 in str(change.facts["variants"])


def test_the_review_of_the_first_version_names_every_signer_and_key(ceremony: Ceremony) -> None:
    reviews = review(ceremony.workspace, NOW)
    subjects = [change.subject for change in one(reviews, "root").changes]
    for name in ("root key of alice", "targets key of erin", "snapshot key of controller-snapshot", "root threshold"):
        assert name in subjects
    (fleet,) = one(reviews, "targets").changes
    assert ceremony.online.director in str(fleet.facts["new director key"])


def test_nothing_is_reviewed_that_cannot_be_shown(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    package = make_package(tmp_path)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    (manifest,) = (ceremony.workspace.folder / "targets").rglob("*.manifest.json")

    manifest.write_bytes(manifest.read_bytes().replace(b"Apache-2.0", b"Elsewhere1"))
    with pytest.raises(RefusedError) as changed:
        review(ceremony.workspace, NOW)
    assert changed.value.code == "registry.target_changed"
    manifest.unlink()
    with pytest.raises(GarrisonError) as missing:
        review(ceremony.workspace, NOW)
    assert missing.value.code == "signing.target_missing"


def test_a_forged_published_version_hides_no_change(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    ceremony.workspace.add_package(make_package(tmp_path), days=365, now=NOW)
    published = ceremony.workspace.folder / "metadata" / "1.targets.json"
    forged, pending = parse_targets(published.read_bytes()), ceremony.workspace.pending_targets()
    assert pending is not None
    forged.signed.targets = pending.signed.targets
    published.write_bytes(to_bytes(forged))

    with pytest.raises(RefusedError) as caught:
        review(ceremony.workspace, NOW)
    assert caught.value.code == "registry.threshold_unmet"


def test_expired_metadata_is_not_reviewed(ceremony: Ceremony) -> None:
    with pytest.raises(RefusedError) as caught:
        review(ceremony.workspace, later(days=366))
    assert caught.value.code == "registry.metadata_expired"


def test_a_change_drops_signatures_made_before(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    ceremony.workspace.add_package(make_package(tmp_path), days=365, now=NOW)
    ceremony.sign("dan", "erin")
    ceremony.workspace.add_package(make_package(tmp_path, "other"), days=365, now=NOW)

    (pending,) = review(ceremony.workspace, NOW)
    assert (pending.version, pending.progress[0].signed, len(pending.changes)) == (2, (), 2)


def test_adding_the_same_package_again_changes_nothing(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    package = make_package(tmp_path)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    ceremony.sign("dan")

    assert not ceremony.workspace.add_package(package, days=365, now=NOW)
    assert review(ceremony.workspace, NOW)[0].progress[0].signed == ("dan",)


def test_a_published_version_keeps_its_content(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    ceremony.workspace.add_package(make_package(tmp_path), days=365, now=NOW)
    ceremony.sign("dan", "erin")
    publish(ceremony)

    with pytest.raises(ConflictError) as caught:
        ceremony.workspace.add_package(make_package(tmp_path / "2", content=b"other"), days=365, now=NOW)
    assert caught.value.code == "package.version_reused"


def test_a_floor_rises_and_never_falls(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    ceremony.workspace.set_floor("tiny", "1.2", days=365, now=NOW)

    assert ceremony.workspace.fleet().floors == {"tiny": "1.2"}
    (pending,) = review(ceremony.workspace, NOW)
    assert pending.changes[0].facts["floor of tiny"] == "none -> 1.2"
    assert "new director key" not in pending.changes[0].facts
    with pytest.raises(RefusedError) as lowered:
        ceremony.workspace.set_floor("tiny", "1.1.9", days=365, now=NOW)
    assert lowered.value.code == "signing.floor_lowered"
    with pytest.raises(RefusedError) as below:
        ceremony.workspace.add_package(make_package(tmp_path), days=365, now=NOW)
    assert below.value.code == "package.below_floor"
    with pytest.raises(GarrisonError) as malformed:
        ceremony.workspace.set_floor("tiny", "two", days=365, now=NOW)
    assert malformed.value.code == "signing.version_invalid"


def test_rotating_a_root_signer_needs_old_and_new_signers(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    frank = make_signer(tmp_path / "keys", "frank")
    version = ceremony.workspace.rotate_root(
        add=[("root", load_public(tmp_path / "keys" / "frank.pub.json"))],
        remove=[("root", "alice")],
        thresholds={},
        days=730,
        now=NOW,
    )
    assert version == 2

    ceremony.workspace.sign(frank)
    ceremony.sign("alice")
    (pending,) = review(ceremony.workspace, NOW)
    assert [(each.by, len(each.signed), each.met) for each in pending.progress] == [
        ("the published root", 1, False),
        ("the new root", 1, False),
    ]
    assert [(c.kind, c.subject) for c in pending.changes] == [
        ("added", "root key of frank"),
        ("removed", "root key of alice"),
    ]
    ceremony.sign("bob")
    publish(ceremony)
    assert ceremony.workspace.root_versions() == [1, 2]


def test_dropping_a_release_signer_asks_for_the_targets_again(ceremony: Ceremony, tmp_path: Path) -> None:
    first_version(ceremony)
    make_signer(tmp_path / "keys", "frank")
    ceremony.workspace.rotate_root(
        add=[("targets", load_public(tmp_path / "keys" / "frank.pub.json"))],
        remove=[("targets", "erin")],
        thresholds={},
        days=365,
        now=NOW,
    )

    targets = one(review(ceremony.workspace, NOW), "targets")
    assert (targets.version, targets.progress[0].unsigned) == (2, ("dan", "frank"))


def test_impossible_thresholds_and_double_keys_are_refused(tmp_path: Path) -> None:
    make_signer(tmp_path, "alice")
    alice = load_public(tmp_path / "alice.pub.json")
    for role, code in (
        (RoleKeys("root", (alice,), 2), "signing.threshold_invalid"),
        (RoleKeys("root", (alice,), 0), "signing.threshold_invalid"),
        (RoleKeys("root", (alice, alice), 2), "signing.key_twice"),
    ):
        with pytest.raises(GarrisonError) as caught:
            role.check()
        assert caught.value.code == code


def test_an_empty_workspace_says_so(tmp_path: Path) -> None:
    with pytest.raises(GarrisonError) as caught:
        Workspace(tmp_path).current_root()
    assert caught.value.code == "signing.workspace_empty"
    with pytest.raises(GarrisonError) as caught:
        review(Workspace(tmp_path), NOW)
    assert caught.value.code == "signing.workspace_empty"


def test_the_review_hides_no_online_key_behind_another(ceremony: Ceremony) -> None:
    first_version(ceremony)
    fleet = ceremony.workspace.fleet()
    old = next(key for key in fleet.keys if key.purpose is KeyPurpose.DIRECTOR)
    shorter = old.model_copy(update={"not_after": later(days=3)})
    new = [old.model_copy(update={"public": digit * 64}) for digit in "ab"]
    others = [key for key in fleet.keys if key.purpose is KeyPurpose.LOG]
    changed = fleet.model_copy(update={"keys": (shorter, *new, *others)})
    ceremony.workspace.change_fleet(changed, days=365, now=NOW)

    (change,) = one(review(ceremony.workspace, NOW), "targets").changes
    assert all(key.public in str(change.facts["new director key"]) for key in new)
    assert f"{later(days=3):%Y-%m-%d}" in str(change.facts["changed director key"])
    assert change.facts["withdrawn receipt key"] == ceremony.online.receipt
    assert "new log key" not in change.facts


def test_a_new_draft_is_there_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_ceremony(tmp_path).workspace
    draft = workspace.current_targets().signed
    draft.version += 1

    def killed(_workspace: Workspace, _role: str, **_but: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "drop_pending", killed)
    with pytest.raises(KeyboardInterrupt):
        workspace.propose("targets", draft)
    monkeypatch.undo()
    pending = workspace.pending_targets()
    assert pending is not None
    assert pending.signed.version == draft.version
