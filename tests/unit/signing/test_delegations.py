from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from garrison_controller.signing.delegations import add_delegation, list_delegations, remove_delegation, renew_family
from garrison_controller.signing.families import check_delegations, families
from garrison_controller.signing.keys import load_public
from garrison_controller.signing.metadata import to_bytes
from garrison_controller.signing.review import Review, review
from garrison_controller.signing.sync import pull, push
from garrison_controller.signing.workspace import Workspace
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, NotFoundError
from tests.fakes.ceremony import NOW, Ceremony, later, make_ceremony, make_package, make_signer
from tests.fakes.published import PublishedRegistry, RegistryRemote

PATTERN = "models/smollm*/*/manifest.json"
SMOL = "models/smollm2/1.0.0/manifest.json"
FAMILY_SIGNERS = ("gina", "hugo")


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    """A workspace with two family signers besides, nothing delegated yet."""
    made = make_ceremony(tmp_path)
    for name in FAMILY_SIGNERS:
        made.signers[name] = make_signer(tmp_path / "keys", name)
    return made


@pytest.fixture
def registry(ceremony: Ceremony) -> Iterator[PublishedRegistry]:
    """The controller, with root 1 and targets 1."""
    made = PublishedRegistry(ceremony)
    ceremony.sign("alice", "bob", "dan", "erin")
    made.push()
    yield made
    made.close()


def delegate(ceremony: Ceremony, *signers: str, name: str = "smollm", path: str = PATTERN, threshold: int = 2) -> None:
    keys = [load_public(ceremony.folder / "keys" / f"{one}.pub.json") for one in signers or FAMILY_SIGNERS]
    add_delegation(ceremony.workspace, name, paths=[path], keys=keys, threshold=threshold, days=365, now=NOW)


def refused(ceremony: Ceremony, **words: object) -> str:
    with pytest.raises(GarrisonError) as caught:
        delegate(ceremony, **words)  # type: ignore[arg-type]
    return caught.value.code


def pending(ceremony: Ceremony) -> dict[str, Review]:
    return {one.role: one for one in review(ceremony.workspace, NOW)}


def test_a_new_delegation_waits_for_release_signers_and_the_familys(ceremony: Ceremony) -> None:
    delegate(ceremony)

    waiting = pending(ceremony)
    assert list(waiting) == ["root", "targets", "family-smollm"]
    [delegation] = [one for one in waiting["targets"].changes if one.subject.startswith("delegation")]
    hands = load_public(ceremony.folder / "keys/gina.pub.json").keyid
    assert (delegation.kind, delegation.facts["paths"], delegation.facts["threshold"]) == ("added", PATTERN, "2 of 2")
    assert f"gina ({hands})" in str(delegation.facts["signers"])
    assert waiting["family-smollm"].progress[0].unsigned == FAMILY_SIGNERS


def test_a_package_goes_to_the_role_that_speaks_for_it(ceremony: Ceremony, tmp_path: Path) -> None:
    delegate(ceremony)
    for name in ("smollm2", "tiny"):
        ceremony.workspace.add_package(make_package(tmp_path / "packages", name), days=30, now=NOW)

    waiting = pending(ceremony)
    [model] = [one for one in waiting["family-smollm"].changes if one.subject.startswith("model")]
    assert (model.subject, model.facts["role"]) == ("model smollm2:1.0.0", "family-smollm")
    assert [one.subject for one in waiting["family-smollm"].changes if one.kind == "within"] == [
        "delegation family-smollm"
    ]
    assert "model tiny:1.0.0" in [one.subject for one in waiting["targets"].changes]
    assert ceremony.workspace.add_package(make_package(tmp_path / "again", "smollm2"), days=30, now=NOW) is False


def test_each_signer_signs_only_the_roles_of_theirs(ceremony: Ceremony) -> None:
    delegate(ceremony)

    assert [one.role for one in ceremony.workspace.sign(ceremony.signers["gina"])] == ["family-smollm"]
    assert [one.role for one in ceremony.workspace.sign(ceremony.signers["dan"])] == ["targets"]
    assert not pending(ceremony)["family-smollm"].complete


def test_a_package_published_before_the_delegation_stays_where_it_is(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "packages", "smollm2")
    ceremony.workspace.add_package(package, days=30, now=NOW)
    registry.upload_blobs(package)
    ceremony.sign("dan", "erin")
    registry.push()
    delegate(ceremony)

    assert ceremony.workspace.add_package(package, days=30, now=NOW) is False
    other = make_package(tmp_path / "other", "smollm2", content=b"other")
    with pytest.raises(ConflictError) as caught:
        ceremony.workspace.add_package(other, days=30, now=NOW)
    assert caught.value.code == "package.version_reused"


def test_push_and_pull_carry_families(ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path) -> None:
    package = make_package(tmp_path / "packages", "smollm2")
    delegate(ceremony)
    ceremony.workspace.add_package(package, days=30, now=NOW)
    registry.upload_blobs(package)
    ceremony.sign("dan", "erin", *FAMILY_SIGNERS)
    remote = RegistryRemote(registry)
    answer = push(ceremony.workspace, remote)

    assert (answer["packages"], answer["families"]) == (["smollm2:1.0.0"], {"family-smollm": 1})
    assert ceremony.workspace.pending_families() == []
    elsewhere = Workspace(tmp_path / "elsewhere")
    pull(elsewhere, remote, str(registry.registry.status()["first_root_sha256"]))
    found = elsewhere.find_target(SMOL)
    assert found is not None
    assert (found[0], elsewhere.target_bytes(found[1])) == ("family-smollm", package.manifest_bytes)
    assert [one.to_dict() for one in list_delegations(elsewhere)] == [
        one.to_dict() for one in list_delegations(ceremony.workspace)
    ]


def test_new_keys_of_a_family_make_its_signers_sign_again(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "packages", "smollm2")
    delegate(ceremony)
    ceremony.workspace.add_package(package, days=30, now=NOW)
    registry.upload_blobs(package)
    ceremony.sign("dan", "erin", *FAMILY_SIGNERS)
    registry.push()
    for name in ("ida", "jan"):
        ceremony.signers[name] = make_signer(tmp_path / "keys", name)
    delegate(ceremony, "ida", "jan")

    assert list(pending(ceremony)) == ["targets", "family-smollm"]
    assert pending(ceremony)["family-smollm"].version == 2
    ceremony.sign("dan", "erin", "ida", "jan")
    assert registry.push().families == {"family-smollm": 2}
    [after] = list_delegations(ceremony.workspace)
    assert (after.signers, after.packages, after.version) == (("ida", "jan"), 1, 2)


def test_a_narrower_path_needs_no_signature_of_the_family(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "packages", "smollm2")
    delegate(ceremony)
    ceremony.workspace.add_package(package, days=30, now=NOW)
    registry.upload_blobs(package)
    ceremony.sign("dan", "erin", *FAMILY_SIGNERS)
    registry.push()

    assert refused(ceremony, path="models/smollm3*/*/manifest.json") == "registry.outside_delegation"
    delegate(ceremony, path="models/smollm2*/*/manifest.json")
    assert list(pending(ceremony)) == ["targets"]
    ceremony.sign("dan", "erin")
    registry.push()


def test_a_family_taken_back_leaves_its_packages_to_the_release_signers(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    delegate(ceremony)
    for version in ("1.0.0", "2.0.0"):
        package = make_package(tmp_path / "packages", "smollm2", version)
        ceremony.workspace.add_package(package, days=30, now=NOW)
        registry.upload_blobs(package)
    ceremony.sign("dan", "erin", *FAMILY_SIGNERS)
    registry.push()
    ceremony.workspace.set_floor("smollm2", "2.0.0", days=30, now=NOW)
    taken = remove_delegation(ceremony.workspace, "smollm", days=30, now=NOW)

    assert taken == ["models/smollm2/2.0.0/manifest.json"]
    shown = [(one.kind, one.subject) for one in pending(ceremony)["targets"].changes]
    assert ("removed", "delegation family-smollm") in shown
    assert ("added", "model smollm2:2.0.0") in shown
    ceremony.sign("dan", "erin")
    assert registry.push().packages == (), "nothing new was published"
    assert "family-smollm.json" in listed(registry), "TUF's clients refuse a snapshot that forgets"
    delegate(ceremony)
    assert pending(ceremony)["family-smollm"].version == 2, "a version is never used twice"
    ceremony.sign("dan", "erin", *FAMILY_SIGNERS)
    registry.push()


def listed(registry: PublishedRegistry) -> list[str]:
    published = registry.registry.store.published()
    assert published is not None
    return list(published.snapshot.signed.meta)


def test_a_family_is_renewed_by_its_own_signers(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "packages", "smollm2")
    delegate(ceremony)
    ceremony.workspace.add_package(package, days=30, now=NOW)
    registry.upload_blobs(package)
    ceremony.sign("dan", "erin", *FAMILY_SIGNERS)
    registry.push()

    assert renew_family(ceremony.workspace, "smollm", days=400, now=NOW) == 2
    [waiting] = pending(ceremony).values()
    assert (waiting.role, waiting.expires) == ("family-smollm", later(days=400))
    assert [one.kind for one in waiting.changes] == ["within"]
    ceremony.sign(*FAMILY_SIGNERS)
    assert registry.push().families == {"family-smollm": 2}
    with pytest.raises(NotFoundError) as caught:
        renew_family(ceremony.workspace, "gemma", days=400, now=NOW)
    assert caught.value.code == "signing.delegation_unknown"


def test_taking_back_what_is_not_delegated_is_refused(ceremony: Ceremony) -> None:
    with pytest.raises(NotFoundError) as caught:
        remove_delegation(ceremony.workspace, "smollm", days=30, now=NOW)
    assert caught.value.code == "signing.delegation_unknown"
    delegate(ceremony)
    remove_delegation(ceremony.workspace, "smollm", days=30, now=NOW)
    assert ceremony.workspace.pending_families() == []
    assert families(ceremony.workspace.current_targets().signed) == {}


@pytest.mark.parametrize(
    "path",
    [
        "fleet.json",
        "*",
        "models/*/*/manifest.json",
        "models/smollm2/1.0.0/manifest.json",
        "models/smol*2/*/manifest.json",
        "models/smollm2/*/*",
        "models/../*/manifest.json",
        "models/[a-z]*/*/manifest.json",
        "models/smollm2/*/manifest.json/",
        "",
    ],
)
def test_only_families_can_be_delegated(ceremony: Ceremony, path: str) -> None:
    assert refused(ceremony, path=path) == "registry.delegation_malformed"
    assert ceremony.workspace.pending_families() == []


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ("smollm*", "smollm2", True),
        ("smollm2", "smollm*", True),
        ("smol*", "smollm*", True),
        ("smollm", "smollm*", True),
        ("smollm2", "smollm2", True),
        ("smollm2", "smollm", False),
        ("smollm*", "gemma*", False),
    ],
)
def test_no_model_belongs_to_two_families(ceremony: Ceremony, first: str, second: str, overlap: bool) -> None:
    delegate(ceremony, name="one", path=f"models/{first}/*/manifest.json")
    if overlap:
        assert refused(ceremony, name="two", path=f"models/{second}/*/manifest.json") == "registry.delegations_overlap"
    else:
        delegate(ceremony, name="two", path=f"models/{second}/*/manifest.json")
        check_delegations(ceremony.workspace.current_targets().signed)


def test_a_person_counts_once_and_a_threshold_can_be_met(ceremony: Ceremony) -> None:
    assert refused(ceremony, threshold=3) == "signing.threshold_invalid"
    key = load_public(ceremony.folder / "keys/gina.pub.json")
    with pytest.raises(InvalidError) as caught:
        add_delegation(ceremony.workspace, "smollm", paths=[PATTERN], keys=[key, key], threshold=2, days=30, now=NOW)
    assert caught.value.code == "signing.key_twice"
    assert refused(ceremony, name="Smollm.x") == "signing.name_invalid"


def test_a_workspace_that_was_tampered_with_is_not_shown_for_signing(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    delegate(ceremony)
    ceremony.sign("dan", "erin", *FAMILY_SIGNERS)
    registry.push()
    package = make_package(tmp_path / "packages", "smollm2")
    ceremony.workspace.add_package(package, days=30, now=NOW)
    # Somebody puts the new package into what is said to be published, so that the review would not show it.
    draft = ceremony.workspace.pending_targets("family-smollm")
    assert draft is not None
    draft.signed.version = 1
    (ceremony.workspace.folder / "metadata" / "1.family-smollm.json").write_bytes(to_bytes(draft))

    with pytest.raises(GarrisonError) as caught:
        review(ceremony.workspace, NOW)
    assert caught.value.code == "registry.threshold_unmet"
