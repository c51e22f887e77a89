"""Attacks by a family's signers, or with their stolen keys, beyond what release signers delegated to them.

In the board's tests whoever attacks also holds the controller's online keys, so that nothing but the board's own checks
stands in between; the controller's tests show that it would not even publish it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, TargetFile, Targets

from garrison_controller.registry.rules import Upload
from garrison_controller.signing.delegations import add_delegation
from garrison_controller.signing.families import families
from garrison_controller.signing.keys import load_public
from garrison_controller.signing.metadata import parse_targets, to_bytes
from garrison_protocol.errors import GarrisonError
from garrison_protocol.keys import SigningKey
from garrison_protocol.states import KeyPurpose
from tests.attacks import standing
from tests.attacks.target import Target
from tests.fakes.ceremony import NOW, Ceremony, make_ceremony, make_package, make_signer
from tests.fakes.packages import Package
from tests.fakes.published import PublishedRegistry, upload_of
from tests.fakes.tuf_repository import FakeFamily
from tests.unit.loop.rig import entry, fleet_json, package

PHI, PHI2, EVIL = package("1.0", "phi"), package("2.0", "phi"), package("6.6")
QWEN = package("1.0", "qwen")


@pytest.fixture
def phi(board: Target) -> FakeFamily:
    """The family phi with one package, and beside it the family qwen with another; the board has seen both."""
    for name, made in (("phi", PHI), ("qwen", QWEN)):
        family = board.repository.delegate(name, f"models/{name}*/*/manifest.json")
        board.repository.content.blobs |= made.blobs
        family.add(made)
    board.repository.publish()
    board.look()
    return board.repository.families["family-phi"]


def see(board: Target, made: Package, rollout: str) -> None:
    """Let the board install ``made``, and so see its family."""
    board.desire(entry(made.ref, rollout))
    board.settle()
    board.forward(1)
    assert board.state == "ACTIVE"


def forge(family: FakeFamily, made: Package, board: Target) -> None:
    family.add(made)
    board.repository.content.blobs |= made.blobs


def nobody_speaks_for(board: Target, made: Package, code: str) -> None:
    """Assert that the board goes on waiting for ``made``, with nothing of it on its disk, and serves on."""
    served = board.served
    board.desire(entry(made.ref, "r9"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", code)
    assert board.served == served
    assert made.ref.manifest_sha256 not in standing.files(board.folder / "state" / "models").values()
    assert not set(made.blobs) & set(standing.files(board.folder / "state" / "blobs").values())


# --- against a board -------------------------------------------------------------------------------------------------


def test_a_family_that_names_a_model_outside_its_paths(board: Target, phi: FakeFamily) -> None:
    """Delegate outside its paths: a threshold of a family's keys approves a model of somebody else's."""
    forge(phi, EVIL, board)
    phi.sign()
    board.repository.publish()
    nobody_speaks_for(board, EVIL, "registry.target_unknown")


def test_a_family_that_names_fleet_json(board: Target, phi: FakeFamily) -> None:
    """Delegate outside its paths: a family hands the fleet to a director of its own, by a careless delegation."""
    thief = SigningKey.generate()
    phi.paths = (*phi.paths, "fleet.json", "*")
    phi.name("fleet.json", fleet_json((KeyPurpose.DIRECTOR, thief)))
    phi.sign()
    board.repository.publish()
    board.look()
    with board.refusing_message("envelope.key_unknown"):
        board.desire(entry(PHI.ref, "r2"), key=thief)


def test_a_family_that_disowns_fleet_json_by_absence(board: Target, phi: FakeFamily) -> None:
    """Delegate outside its paths: targets metadata without fleet.json, so that a delegate's would be found next."""
    thief = SigningKey.generate()
    phi.paths = (*phi.paths, "fleet.json")
    phi.name("fleet.json", fleet_json((KeyPurpose.DIRECTOR, thief)))
    phi.sign()
    del board.repository.targets["fleet.json"]
    board.repository.publish()
    board.look()
    with board.refusing_message("envelope.key_unknown"):
        board.desire(entry(PHI.ref, "r2"), key=thief)


def test_a_family_rolled_back_to_a_version_before(board: Target, phi: FakeFamily) -> None:
    """Rollback: online keys lead back to a family's older metadata, which its own signers once signed."""
    old = phi.data
    forge(phi, PHI2, board)
    phi.sign()
    board.repository.publish()
    see(board, PHI2, "r2")
    with board.refusing_metadata("registry.rollback"):
        phi.data, phi.version = old, 1
        board.repository.publish()


def test_a_family_rolled_back_on_a_board_that_lost_its_cache(board: Target, phi: FakeFamily) -> None:
    """Rollback: the same, and the board's cache of metadata was deleted beforehand."""
    old = phi.data
    forge(phi, PHI2, board)
    phi.sign()
    board.repository.publish()
    see(board, PHI2, "r2")
    (board.folder / "state/registry/trusted.json").unlink()
    phi.data, phi.version = old, 1
    board.repository.publish()
    with board.refusing_package("registry.rollback"):
        board.desire(entry(PHI.ref, "r3"))


def test_a_stolen_family_key_below_the_threshold(board: Target, phi: FakeFamily) -> None:
    """Key compromise: one of a family's two keys, and all of the controller's."""
    forge(phi, PHI2, board)
    phi.sign(signers=1)
    board.repository.publish()
    with board.refusing_package("registry.bad_signature"):
        board.desire(entry(PHI2.ref, "r2"))


def test_a_key_that_was_taken_from_a_family(board: Target, phi: FakeFamily) -> None:
    """Key compromise: a threshold of keys that the release signers have replaced since."""
    replaced = board.repository.delegate("phi", *phi.paths)
    replaced.add(PHI)
    board.repository.publish()
    forge(phi, PHI2, board)
    phi.sign(version=2)
    replaced.data, replaced.version = phi.data, 2
    board.repository.publish()
    with board.refusing_package("registry.bad_signature"):
        board.desire(entry(PHI2.ref, "r2"))


def test_mix_and_match_of_one_familys_metadata_with_anothers_name(board: Target, phi: FakeFamily) -> None:
    """Mix and match: one family's signers sign the other's models, and their metadata is served under its name."""
    qwen = board.repository.families["family-qwen"]
    forge(qwen, PHI2, board)
    qwen.sign()
    phi.data, phi.version = qwen.data, qwen.version
    board.repository.publish()
    with board.refusing_package("registry.bad_signature"):
        board.desire(entry(PHI2.ref, "r2"))


def test_mix_and_match_of_families_of_two_moments(board: Target, phi: FakeFamily) -> None:
    """Mix and match: a mirror without any key serves an older version of a family with today's snapshot."""
    old = phi.data
    forge(phi, PHI2, board)
    phi.sign()
    board.repository.publish()
    board.content["2.family-phi.json"] = old
    with board.refusing_package("registry.damaged"):
        board.desire(entry(PHI.ref, "r2"))


def test_a_family_withheld_so_that_another_speaks_in_its_place(board: Target, phi: FakeFamily) -> None:
    """Mix and match: two delegations cover one model, and the mirror withholds the one that comes first."""
    other = board.repository.delegate("phi2", "models/phi*/*/manifest.json")
    forge(other, PHI2, board)
    board.repository.publish()
    del board.content["1.family-phi.json"]
    nobody_speaks_for(board, PHI2, "source.not_found")


def test_a_family_that_publishes_a_version_of_the_release_signers_again(board: Target, phi: FakeFamily) -> None:
    """Version reuse: a family publishes, with other content, a version that the release signers published."""
    own = Package(PHI2.manifest.model_copy(update={"publisher": "release signers"}), PHI2.blobs)
    board.repository.add(own)
    forge(phi, PHI2, board)
    phi.sign()
    board.repository.publish()
    with board.refusing_package("registry.manifest_mismatch"):
        board.desire(entry(PHI2.ref, "r2"))


def test_a_family_that_delegates_further(board: Target, phi: FakeFamily) -> None:
    """Delegation: a family hands its models on to keys that no release signer has seen."""
    nested = FakeFamily("family-deeper", phi.paths, 1, 1)
    nested.add(PHI2)
    nested.sign()
    phi.sign(nested=nested)
    board.repository.publish()
    board.content["1.family-deeper.json"] = nested.data
    with board.refusing_package("registry.damaged"):
        board.desire(entry(PHI2.ref, "r2"))


# --- against the controller ------------------------------------------------------------------------------------------


@pytest.fixture
def ceremony(tmp_path: Path) -> Iterator[tuple[Ceremony, PublishedRegistry]]:
    """A registry whose families ``phi`` (gina, hugo) and ``qwen`` (ida, jan) have published one package each."""
    made = make_ceremony(tmp_path)
    registry = PublishedRegistry(made)
    for name, people in (("phi", ("gina", "hugo")), ("qwen", ("ida", "jan"))):
        for one in people:
            made.signers[one] = make_signer(tmp_path / "keys", one)
        keys = [load_public(tmp_path / "keys" / f"{one}.pub.json") for one in people]
        path = f"models/{name}*/*/manifest.json"
        add_delegation(made.workspace, name, paths=[path], keys=keys, threshold=2, days=365, now=NOW)
        package_ = make_package(tmp_path / "packages", name)
        registry.upload_blobs(package_)
        made.workspace.add_package(package_, days=365, now=NOW)
    made.sign("alice", "bob", "dan", "erin", "gina", "hugo", "ida", "jan")
    registry.push()
    yield made, registry
    registry.close()


def forged(made: Ceremony, role: str, *signers: str, path: str, version: int = 2) -> Upload:
    """Return a push of ``role`` that names besides what it has a manifest at ``path``, signed by ``signers``."""
    published = made.workspace.published_targets(role)
    assert published is not None
    manifest = b'{"forged": true}'
    targets = Targets(version=version, expires=published.signed.expires, targets=dict(published.signed.targets))
    targets.targets[path] = TargetFile.from_data(path, manifest, ["sha256"])
    metadata = Metadata(targets)
    for name in signers:
        metadata.sign(made.signers[name], append=True)
    return Upload(families={role: to_bytes(metadata)}, files={path: manifest})


def refused(made: tuple[Ceremony, PublishedRegistry], upload: Upload, code: str) -> None:
    """Assert that a push is refused so and changes no file."""
    _, registry = made
    before = standing.files(registry.folder)
    with pytest.raises(GarrisonError) as caught:
        registry.registry.accept_metadata(upload, "id-eve", "eve", NOW)
    assert (caught.value.code, bool(caught.value.hint)) == (code, True)
    assert standing.files(registry.folder) == before


@pytest.mark.parametrize("path", ["fleet.json", "models/qwen/2.0.0/manifest.json", "models/phi/2.0.0/x/manifest.json"])
def test_a_push_of_a_family_outside_its_paths(ceremony: tuple[Ceremony, PublishedRegistry], path: str) -> None:
    """Delegate outside its paths: a family's signers push metadata that names what is not theirs."""
    upload = forged(ceremony[0], "family-phi", "gina", "hugo", path=path)
    refused(ceremony, upload, "registry.outside_delegation")


@pytest.mark.parametrize("signers", [(), ("gina",), ("gina", "ida"), ("dan", "erin"), ("gina", "gina")])
def test_a_push_of_a_family_below_its_threshold(
    ceremony: tuple[Ceremony, PublishedRegistry], signers: tuple[str, ...]
) -> None:
    """Key compromise: too few of a family's keys, with or without other roles' keys, push in its name."""
    upload = forged(ceremony[0], "family-phi", *signers, path="models/phi/2.0.0/manifest.json")
    refused(ceremony, upload, "registry.threshold_unmet")


@pytest.mark.parametrize("version", [1, 3, 9])
def test_a_push_of_a_family_with_a_version_that_does_not_follow(
    ceremony: tuple[Ceremony, PublishedRegistry], version: int
) -> None:
    """Rollback and fast-forward: a family's version is used again, or skips some."""
    upload = forged(ceremony[0], "family-phi", "gina", "hugo", path="models/phi/2.0.0/manifest.json", version=version)
    refused(ceremony, upload, "registry.version_not_next")


def test_a_push_of_one_family_under_anothers_name(ceremony: tuple[Ceremony, PublishedRegistry]) -> None:
    """Mix and match: one family's fully signed metadata is pushed as another's."""
    upload = forged(ceremony[0], "family-qwen", "ida", "jan", path="models/phi/2.0.0/manifest.json")
    swapped = replace(upload, families={"family-phi": upload.families["family-qwen"]})
    refused(ceremony, swapped, "registry.threshold_unmet")


def test_a_push_of_a_role_that_nobody_delegated(ceremony: tuple[Ceremony, PublishedRegistry]) -> None:
    """Delegation: metadata of a role that the targets metadata does not know."""
    upload = forged(ceremony[0], "family-phi", "gina", "hugo", path="models/phi/2.0.0/manifest.json")
    unknown = replace(upload, families={"family-evil": upload.families["family-phi"]})
    refused(ceremony, unknown, "registry.role_unknown")


def test_a_push_of_a_family_that_delegates_further(ceremony: tuple[Ceremony, PublishedRegistry]) -> None:
    """Delegation: a family's signers delegate to keys of their own choice."""
    made, _ = ceremony
    published, top = made.workspace.published_targets("family-phi"), made.workspace.published_targets()
    assert published is not None
    assert top is not None
    signed = replace_version(published.signed)
    signed.delegations = top.signed.delegations
    metadata = Metadata(signed)
    for name in ("gina", "hugo"):
        metadata.sign(made.signers[name], append=True)
    refused(ceremony, Upload(families={"family-phi": to_bytes(metadata)}), "registry.delegation_nested")


def replace_version(signed: Targets) -> Targets:
    return Targets(version=signed.version + 1, expires=signed.expires, targets=dict(signed.targets))


def test_a_push_of_a_version_that_another_role_has_published(
    ceremony: tuple[Ceremony, PublishedRegistry], tmp_path: Path
) -> None:
    """Version reuse: release signers are led to publish, with other content, what a family has published."""
    made, _ = ceremony
    other = make_package(tmp_path / "other", "phi", content=b"other")
    top = made.workspace.published_targets()
    assert top is not None
    path = "models/phi/1.0.0/manifest.json"
    signed = parse_targets(to_bytes(top)).signed
    signed.version += 1
    signed.targets[path] = TargetFile.from_data(path, other.manifest_bytes, ["sha256"])
    metadata = Metadata(signed)
    for name in ("dan", "erin"):
        metadata.sign(made.signers[name], append=True)
    upload = Upload(targets=to_bytes(metadata), files={path: other.manifest_bytes})
    refused(ceremony, upload, "registry.version_reused")


def test_a_push_that_brings_back_a_family_without_its_signers(
    ceremony: tuple[Ceremony, PublishedRegistry], tmp_path: Path
) -> None:
    """Delegation: release signers swap a family's keys, and somebody pushes before the new signers have signed."""
    made, _ = ceremony
    made.signers["kim"] = make_signer(tmp_path / "keys", "kim")
    key = load_public(tmp_path / "keys" / "kim.pub.json")
    path = "models/phi*/*/manifest.json"
    add_delegation(made.workspace, "phi", paths=[path], keys=[key], threshold=1, days=365, now=NOW)
    made.sign("dan", "erin")
    upload = upload_of(made.workspace)
    assert upload.targets is not None
    assert families(parse_targets(upload.targets).signed)["family-phi"].threshold == 1
    refused(ceremony, replace(upload, families={}), "registry.threshold_unmet")
    refused(ceremony, upload, "registry.threshold_unmet")
