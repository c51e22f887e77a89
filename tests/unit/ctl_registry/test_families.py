"""What the controller publishes of model families and the delegations to them; attacks are in tests/attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, SuccinctRoles, Targets

from garrison_controller.access import queries as access_queries
from garrison_controller.registry import queries
from garrison_controller.registry.rules import Upload
from garrison_controller.signing.delegations import add_delegation, remove_delegation
from garrison_controller.signing.keys import load_public
from garrison_controller.signing.metadata import parse_targets, to_bytes
from garrison_protocol.errors import GarrisonError
from tests.fakes.ceremony import NOW, Ceremony, later, make_package, make_signer
from tests.fakes.published import PublishedRegistry, upload_of

ROLE = "family-smollm"
PATH = "models/smollm2/1.0.0/manifest.json"


@pytest.fixture
def family(ceremony: Ceremony, published: PublishedRegistry, tmp_path: Path) -> PublishedRegistry:
    """The registry with the family smollm (gina, hugo) and its smollm2:1.0.0, published together."""
    for name in ("gina", "hugo"):
        ceremony.signers[name] = make_signer(tmp_path / "keys", name)
    keys = [load_public(tmp_path / "keys" / f"{name}.pub.json") for name in ("gina", "hugo")]
    pattern = "models/smollm*/*/manifest.json"
    add_delegation(ceremony.workspace, "smollm", paths=[pattern], keys=keys, threshold=2, days=365, now=NOW)
    add(ceremony, published, tmp_path, "1.0.0", days=30)
    ceremony.sign("dan", "erin", "gina", "hugo")
    published.push()
    return published


def add(ceremony: Ceremony, registry: PublishedRegistry, folder: Path, version: str, *, days: int = 30) -> None:
    package = make_package(folder / "packages", "smollm2", version)
    registry.upload_blobs(package)
    ceremony.workspace.add_package(package, days=days, now=NOW)


def refusal(registry: PublishedRegistry, upload: Upload) -> str:
    before = {path: path.read_bytes() for path in registry.folder.rglob("*.json")}
    with pytest.raises(GarrisonError) as caught:
        registry.registry.accept_metadata(upload, "id-anna", "anna", NOW)
    assert {path: path.read_bytes() for path in registry.folder.rglob("*.json")} == before
    return caught.value.code


def signed_by_release_signers(ceremony: Ceremony, change: Callable[[Targets], None]) -> Upload:
    """Return a push of the next targets version with ``change``, properly signed."""
    published = ceremony.workspace.published_targets()
    assert published is not None
    signed = parse_targets(to_bytes(published)).signed
    signed.version += 1
    change(signed)
    metadata = Metadata(signed)
    for name in ("dan", "erin"):
        metadata.sign(ceremony.signers[name], append=True)
    return Upload(targets=to_bytes(metadata))


def test_a_family_publishes_by_itself(ceremony: Ceremony, family: PublishedRegistry, tmp_path: Path) -> None:
    add(ceremony, family, tmp_path, "2.0.0")
    ceremony.sign("gina", "hugo")
    publication = family.push()

    assert (publication.targets, publication.families, publication.packages) == (2, {ROLE: 2}, ("smollm2:2.0.0",))
    with family.database.reading() as session:
        assert queries.get_package(session, "smollm2", "2.0.0").targets_version == 2
        events = [one.detail for one in access_queries.events(session) if one.action == "registry.publish"]
    assert events[-1] == {"root": 1, "targets": 2, ROLE: 2}
    status = family.registry.status()["families"]
    assert isinstance(status, dict)
    assert (status[ROLE]["version"], status[ROLE]["targets"], status[ROLE]["threshold"]) == (2, 2, 2)


def test_python_tufs_own_client_finds_a_familys_targets(
    ceremony: Ceremony, family: PublishedRegistry, tmp_path: Path
) -> None:
    add(ceremony, family, tmp_path, "2.0.0")
    ceremony.sign("gina", "hugo")
    updater = family.updater(tmp_path / "cache")
    family.push()

    target = updater.get_targetinfo(PATH)
    assert target is not None
    assert Path(updater.download_target(target)).read_bytes().startswith(b"{")
    assert updater.get_targetinfo("models/smollm2/2.0.0/manifest.json") is not None
    assert updater.get_targetinfo("models/smollm2/3.0.0/manifest.json") is None
    assert updater.get_targetinfo("fleet.json") is not None


def test_the_same_push_of_a_family_changes_nothing(
    ceremony: Ceremony, family: PublishedRegistry, tmp_path: Path
) -> None:
    add(ceremony, family, tmp_path, "2.0.0")
    ceremony.sign("gina", "hugo")
    upload = upload_of(ceremony.workspace)
    family.push()

    again = family.registry.accept_metadata(upload, "id-otto", "otto", NOW)
    assert (again.unchanged, again.families) == (True, {})


def test_signing_online_roles_again_keeps_families(family: PublishedRegistry, tmp_path: Path) -> None:
    assert family.registry.refresh_online(later(days=20))

    published = family.registry.store.published()
    assert published is not None
    assert (published.listed, published.snapshot.signed.version) == ({ROLE: 1}, 3)
    assert family.updater(tmp_path / "cache").get_targetinfo(PATH) is not None


def test_an_expired_family_does_not_hold_up_the_others(
    ceremony: Ceremony, family: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "packages", "tiny")
    family.upload_blobs(package)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    ceremony.sign("dan", "erin")

    at = later(days=60)
    publication = family.registry.accept_metadata(upload_of(ceremony.workspace), "id-anna", "anna", at)
    assert publication.packages == ("tiny:1.0.0",)


def test_an_expired_familys_next_version_is_refused(
    ceremony: Ceremony, family: PublishedRegistry, tmp_path: Path
) -> None:
    add(ceremony, family, tmp_path, "2.0.0", days=1)
    ceremony.sign("gina", "hugo")
    with pytest.raises(GarrisonError) as caught:
        family.registry.accept_metadata(upload_of(ceremony.workspace), "id-anna", "anna", later(days=2))
    assert caught.value.code == "registry.metadata_expired"


def test_a_delegation_comes_with_its_familys_metadata(
    ceremony: Ceremony, family: PublishedRegistry, tmp_path: Path
) -> None:
    keys = [load_public(tmp_path / "keys" / "gina.pub.json")]
    path = "models/gemma/*/manifest.json"
    add_delegation(ceremony.workspace, "gemma", paths=[path], keys=keys, threshold=1, days=30, now=NOW)
    ceremony.sign("dan", "erin")
    upload = upload_of(ceremony.workspace)

    assert refusal(family, replace(upload, families={})) == "registry.family_missing"
    assert refusal(family, upload) == "registry.threshold_unmet"
    ceremony.sign("gina")
    assert family.push().families == {"family-gemma": 1}


def test_a_family_that_is_dropped_must_not_drop_its_packages(ceremony: Ceremony, family: PublishedRegistry) -> None:
    def drop(targets: Targets) -> None:
        targets.delegations = None

    assert refusal(family, signed_by_release_signers(ceremony, drop)) == "registry.target_removed"
    remove_delegation(ceremony.workspace, "smollm", days=30, now=NOW)
    ceremony.sign("dan", "erin")
    family.push()
    published = family.registry.store.published()
    assert published is not None
    assert published.every_target[PATH][0] == "targets"
    assert published.listed == {ROLE: 1}, "TUF's clients refuse a snapshot that forgets a role"


def test_a_family_keeps_what_it_has_published(ceremony: Ceremony, family: PublishedRegistry) -> None:
    published = ceremony.workspace.published_targets(ROLE)
    assert published is not None
    metadata = Metadata(Targets(version=2, expires=published.signed.expires))
    for name in ("gina", "hugo"):
        metadata.sign(ceremony.signers[name], append=True)

    assert refusal(family, Upload(families={ROLE: to_bytes(metadata)})) == "registry.target_removed"


def test_delegations_of_another_form_are_refused(ceremony: Ceremony, family: PublishedRegistry) -> None:
    published = ceremony.workspace.published_targets()
    assert published is not None
    known = published.signed.delegations
    assert known is not None
    assert known.roles is not None
    role = known.roles[ROLE]
    bins = SuccinctRoles(role.keyids, 1, bit_length=8, name_prefix="bin")
    wide = ["models/*/*/manifest.json"]

    def delegated(**words: object) -> Delegations:
        made = {"keyids": role.keyids, "threshold": 2, "terminating": True, "paths": role.paths} | words
        return Delegations(known.keys, {ROLE: DelegatedRole(ROLE, **made)})  # type: ignore[arg-type]

    for delegations in (
        Delegations(known.keys, None, bins),
        Delegations(known.keys, {"elsewhere": DelegatedRole("elsewhere", role.keyids, 2, True, role.paths)}),
        Delegations({}, {ROLE: role}),
        delegated(terminating=False),
        delegated(threshold=3),
        delegated(paths=wide),
        delegated(paths=["fleet.json"]),
        delegated(paths=[]),
        delegated(paths=None, path_hash_prefixes=["ab"]),
    ):

        def change(targets: Targets, made: Delegations = delegations) -> None:
            targets.delegations = made

        assert refusal(family, signed_by_release_signers(ceremony, change)) == "registry.delegation_malformed"
