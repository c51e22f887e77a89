"""Attacks on those who sign: keys left open, too few signers, stolen keys, and what comes to a signer on a stick.

The attacker may write where signers and the controller read, and may hold some keys. What must stay as it is are the
signers' workspace, the published registry, and the controller's database: digests before and after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import TargetFile

from garrison_controller.cli.ceremony import show_reviews
from garrison_controller.config import ControllerConfig, KeysConfig
from garrison_controller.devices import pki
from garrison_controller.devices.keyring import find_passphrase
from garrison_controller.registry.rules import Upload
from garrison_controller.signing.delegations import add_delegation
from garrison_controller.signing.key_uris import open_uri
from garrison_controller.signing.keys import load_public, load_signer, public_key
from garrison_controller.signing.metadata import parse_root, parse_targets, to_bytes, write_durable
from garrison_controller.signing.packing import MakersSignature, Package, open_package, pack
from garrison_controller.signing.review import review
from garrison_controller.signing.transfer import import_workspace
from garrison_controller.signing.workspace import Workspace, first_root_sha256
from garrison_protocol.errors import GarrisonError
from garrison_protocol.fleet import FLEET_TARGET
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import target_path
from tests.attacks import standing
from tests.fakes.ceremony import NOW, PASSPHRASE, Ceremony, draft, make_ceremony, make_package, make_signer
from tests.fakes.makers import FILES, Maker, draft_of, makers_signature, write_files
from tests.fakes.published import PublishedRegistry, upload_of

GOOD_PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    """A registry, root 2 of 3 and targets 2 of 2, whose first versions are signed and waiting."""
    (tmp_path / "signers").mkdir()
    ceremony = make_ceremony(tmp_path / "signers")
    ceremony.sign("alice", "bob", "dan", "erin")
    return ceremony


@pytest.fixture
def registry(ceremony: Ceremony) -> Iterator[PublishedRegistry]:
    """The controller's registry, with the first versions published."""
    published = PublishedRegistry(ceremony)
    published.push()
    yield published
    published.close()


@contextmanager
def refused(code: str, *untouched: Path) -> Iterator[None]:
    """Expect exactly this refusal, and every file below ``untouched`` as it was."""
    before = [standing.files(folder, ".lock", "controller.db") for folder in untouched]
    with pytest.raises(GarrisonError) as caught:
        yield
    assert caught.value.code == code
    assert [standing.files(folder, ".lock", "controller.db") for folder in untouched] == before


def attacked(ceremony: Ceremony, registry: PublishedRegistry, code: str) -> None:
    """Push what is pending as an attacker would, past the tools' own checks, and see it refused."""
    tables = standing.controller_tables(ceremony.folder / "state" / "controller.db")
    with refused(code, registry.folder, ceremony.workspace.folder):
        registry.registry.accept_metadata(upload_of(ceremony.workspace), "id-mallory", "mallory", NOW)
    assert standing.controller_tables(ceremony.folder / "state" / "controller.db") == tables


# --- keys that lie open ----------------------------------------------------------------------------------------------


def test_a_signers_key_that_others_can_read(ceremony: Ceremony) -> None:
    """A private key of a signer lies open to other users of the machine, who may have copied it."""
    path = ceremony.folder / "keys" / "alice.key"
    for mode in (0o640, 0o604, 0o660, 0o644):
        path.chmod(mode)
        with refused("key.readable_by_others", ceremony.folder):
            load_signer(path, PASSPHRASE)


def test_an_unencrypted_key_by_uri_that_others_can_read(ceremony: Ceremony) -> None:
    """A key that is named as file2:PATH, without a passphrase, lies open to others, through a link as well."""
    key = ceremony.folder / "plain.key"
    SigningKey.generate().save(key)
    key.chmod(0o644)
    link = ceremony.folder / "link.key"
    link.symlink_to(key)
    public = load_public(ceremony.folder / "keys" / "alice.pub.json")
    for path in (key, link):
        with refused("key.readable_by_others", ceremony.folder):
            open_uri(f"file2:{path}", public, lambda _: "")


@pytest.fixture
def controller(tmp_path: Path) -> ControllerConfig:
    """The configuration of an initialised controller with encrypted keys."""
    passphrase = tmp_path / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text(f"{GOOD_PASSPHRASE}\n")
    config = ControllerConfig(
        state_dir=tmp_path / "controller",
        public_url="https://fleet.example:8443",
        keys=KeysConfig(passphrase_file=passphrase),
    )
    pki.initialise(config, NOW, find_passphrase(config))
    return config


def test_an_online_key_that_others_can_read(controller: ControllerConfig) -> None:
    """A private key of the controller, or of one of its authorities, is made readable to another user of its host."""
    for path in (*controller.keys_dir.glob("*.key"), controller.pki_dir / "device-ca.key"):
        path.chmod(0o640)
        with refused("key.readable_by_others", controller.state_dir):
            pki.load_online_keys(controller)
            pki.load_authority(controller, pki.DEVICE_CA)
        path.chmod(0o600)
    assert pki.load_online_keys(controller)


def test_the_passphrase_of_the_online_keys_that_others_can_read(controller: ControllerConfig) -> None:
    """The file that opens every key of the controller is readable to others: then encryption is worth nothing."""
    assert controller.keys.passphrase_file is not None
    controller.keys.passphrase_file.chmod(0o644)
    with refused("key.readable_by_others", controller.state_dir):
        pki.load_online_keys(controller)


def test_a_copied_disk_without_the_passphrase(controller: ControllerConfig) -> None:
    """A thief has the controller's state folder, a backup for instance, and not its passphrase."""
    thief = controller.model_copy(update={"keys": KeysConfig()})
    with refused("key.passphrase_missing", controller.state_dir):
        pki.load_online_keys(thief)
    guess = controller.state_dir.parent / "guess"
    guess.touch(mode=0o600)
    guess.write_text("correct horse battery stapler\n")
    with refused("key.wrong_passphrase", controller.state_dir):
        pki.load_online_keys(controller.model_copy(update={"keys": KeysConfig(passphrase_file=guess)}))
    for path in (*controller.keys_dir.glob("*.key"), *controller.pki_dir.glob("*-ca.key")):
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()


def test_a_plain_key_put_in_place_of_an_encrypted_one(controller: ControllerConfig) -> None:
    """Somebody who can write the key folder, and not read the passphrase, puts a director key of their own there."""
    path = controller.keys_dir / "director.key"
    path.unlink()
    SigningKey.generate().save(path)
    with refused("key.not_encrypted", controller.state_dir):
        pki.load_online_keys(controller)


# --- too few signers -------------------------------------------------------------------------------------------------


def test_a_model_below_the_threshold(ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path) -> None:
    """One of two release signers publishes a model alone, and signs twice to look like two."""
    package = make_package(tmp_path)
    registry.upload_blobs(package)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    ceremony.sign("dan", "dan")
    with refused("registry.threshold_unmet", ceremony.workspace.folder):
        ceremony.workspace.completed()
    attacked(ceremony, registry, "registry.threshold_unmet")


def test_a_root_below_the_threshold(ceremony: Ceremony, registry: PublishedRegistry) -> None:
    """One of three root signers removes the other two, and lets the new root, in which one is enough, judge itself."""
    ceremony.workspace.rotate_root(
        add=[], remove=[("root", "bob"), ("root", "carol")], thresholds={"root": 1}, days=730, now=NOW
    )
    ceremony.sign("alice")
    attacked(ceremony, registry, "registry.threshold_unmet")


def test_root_signers_that_were_removed(ceremony: Ceremony, registry: PublishedRegistry) -> None:
    """Two root signers, one of them removed since, sign the next root."""
    ceremony.workspace.rotate_root(add=[], remove=[("root", "carol")], thresholds={}, days=730, now=NOW)
    ceremony.sign("alice", "bob")
    registry.push()
    ceremony.workspace.rotate_root(add=[], remove=[], thresholds={}, days=730, now=NOW)
    pending = ceremony.workspace.pending_root()
    assert pending is not None
    for name in ("alice", "carol"):
        pending.sign(ceremony.signers[name], append=True)
    write_durable(ceremony.workspace.folder / "pending" / "3.root.json", to_bytes(pending))
    attacked(ceremony, registry, "registry.threshold_unmet")


def test_stolen_online_keys_and_one_of_two_release_signers(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    """A thief holds every online key and one release signer's key, and signs a model with all of them."""
    package = make_package(tmp_path, content=b"a model of the thief's")
    registry.upload_blobs(package)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    pending = ceremony.workspace.pending_targets()
    assert pending is not None
    keys = ceremony.folder / "online"
    stolen = [open_uri(f"file2:{keys / name}.key", _public(keys / f"{name}.key"), _no_secret) for name in _ONLINE]
    for signer in (ceremony.signers["dan"], *stolen):
        pending.sign(signer, append=True)
    assert len(pending.signatures) == 1 + len(_ONLINE)
    write_durable(ceremony.workspace.folder / "pending" / "2.targets.json", to_bytes(pending))
    attacked(ceremony, registry, "registry.threshold_unmet")


def test_an_online_key_that_the_controller_never_made(ceremony: Ceremony, registry: PublishedRegistry) -> None:
    """Somebody slips another director key into the online.json that release signers are given; they sign it."""
    fleet = ceremony.workspace.fleet()
    keys = [
        key.model_copy(update={"public": SigningKey.generate().public_hex}) if key.purpose == "director" else key
        for key in fleet.keys
    ]
    ceremony.workspace.change_fleet(fleet.model_copy(update={"keys": tuple(keys)}), days=365, now=NOW)
    ceremony.sign("dan", "erin")
    attacked(ceremony, registry, "registry.fleet_lacks_keys")


# --- what a signer is shown ------------------------------------------------------------------------------------------


def test_a_manifest_that_is_not_the_one_in_the_metadata(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    """A signer is shown a harmless manifest, while the metadata that waits for the signature names another one."""
    package = make_package(tmp_path)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    (shown,) = (ceremony.workspace.folder / "targets").rglob("*.manifest.json")
    shown.write_bytes(shown.read_bytes().replace(b"Apache-2.0", b"AllRights1"))
    with refused("registry.target_changed", ceremony.workspace.folder):
        review(ceremony.workspace, NOW)
    assert registry.registry.status()["targets"] == 1


def test_a_key_under_another_keys_id(ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path) -> None:
    """Whoever prepares a root, or a family, puts a key of their own under the id of the key that others compared."""
    own = make_signer(tmp_path / "mallory", "mallory").public_key.keyval["public"]
    ceremony.signers["rune"] = make_signer(ceremony.folder / "keys", "rune")
    rune = load_public(ceremony.folder / "keys" / "rune.pub.json")
    ceremony.workspace.rotate_root(add=[("root", rune)], remove=[("root", "carol")], thresholds={}, days=730, now=NOW)
    _swap_key(ceremony.workspace.folder / "pending" / "2.root.json", rune.keyid, own)
    with refused("registry.key_misnamed", ceremony.workspace.folder):
        review(ceremony.workspace, NOW)
    with refused("registry.key_misnamed", ceremony.workspace.folder):
        ceremony.workspace.sign(ceremony.signers["alice"])
    roots = ((ceremony.workspace.folder / "pending" / "2.root.json").read_bytes(),)
    with refused("registry.key_misnamed", registry.folder):
        registry.registry.accept_metadata(Upload(roots=roots), "id-mallory", "mallory", NOW)
    ceremony.workspace.drop_pending("root")

    paths = ["models/tiny*/*/manifest.json"]
    add_delegation(ceremony.workspace, "tiny", paths=paths, keys=[rune], threshold=1, days=365, now=NOW)
    _swap_key(ceremony.workspace.folder / "pending" / "2.targets.json", rune.keyid, own)
    with refused("registry.key_misnamed", ceremony.workspace.folder):
        review(ceremony.workspace, NOW)


def _swap_key(path: Path, keyid: str, public: str) -> None:
    document = json.loads(path.read_bytes())
    signed = document["signed"]
    keys = signed["keys"] if "keys" in signed else signed["delegations"]["keys"]
    keys[keyid]["keyval"]["public"] = public
    path.write_text(json.dumps(document))


def test_words_that_rewrite_a_signers_terminal(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest's publisher, or a signer's name, moves the cursor and writes over the digest that is shown."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"evil")
    evil = "evil\x1b[3A\x1b[2Kmanifest_sha256: 00\x9b2K\u202e\n  signatures by the targets role: 2 of 2 needed"
    package = pack(draft(publisher=evil), {"model.gguf": source}, tmp_path / "package", NOW)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    show_reviews(review(ceremony.workspace, NOW))
    shown = capsys.readouterr().err
    assert "\\x1b[3A\\x1b[2K" in shown
    lines = shown.splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line.split(":")[0] for line in lines if line.startswith("  signatures")] == [
        "  signatures by the targets role"
    ]
    assert "1 of 2" not in shown
    assert any("0 of 2 needed" in line for line in lines)


def test_a_file_or_a_lease_that_no_signer_was_shown(
    ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path
) -> None:
    """The first file of a model is the one that everybody knows; a second, and a lease of an hour, are not."""
    variant = {
        "name": "q4",
        "runtime": {"engine": "llama.cpp"},
        "memory_mb": 100,
        "files": [{"path": "model.gguf"}, {"path": "template.jinja"}],
        "model_settings": {"draft": "template.jinja"},
    }
    sources = {}
    for name in ("model.gguf", "template.jinja"):
        sources[name] = tmp_path / name
        sources[name].write_bytes(name.encode())
    manifest = draft(variants=[variant], lease={"days": 0.05, "on_expiry": "stop"})
    package = pack(manifest, sources, tmp_path / "package", NOW)
    ceremony.workspace.add_package(package, days=365, now=NOW)
    (shown,) = review(ceremony.workspace, NOW)
    facts = shown.changes[0].facts
    for file in package.manifest.variants[0].files:
        assert f"{file.path} sha256 {file.sha256}" in str(facts["variants"])
    assert "draft=template.jinja" in str(facts["variants"])
    assert facts["lease"] == "0.05 days, then stop"


# --- a workspace on a stick ------------------------------------------------------------------------------------------


@pytest.fixture
def copy(ceremony: Ceremony, registry: PublishedRegistry, tmp_path: Path) -> Workspace:
    """Another signer's workspace, as it comes back on a stick."""
    workspace = Workspace(tmp_path / "stick")
    import_workspace(workspace, ceremony.workspace.folder, first_root_sha256(ceremony.workspace), NOW)
    return workspace


def test_a_workspace_from_yesterday(
    ceremony: Ceremony, registry: PublishedRegistry, copy: Workspace, tmp_path: Path
) -> None:
    """A stick brings yesterday's registry, in which today's floor against a bad model is missing."""
    ceremony.workspace.set_floor("tiny", "1.1", days=365, now=NOW)
    ceremony.sign("dan", "erin")
    registry.push()
    with refused("signing.import_older", ceremony.workspace.folder):
        import_workspace(ceremony.workspace, copy.folder, None, NOW)


def test_a_link_in_a_workspace(ceremony: Ceremony, copy: Workspace, tmp_path: Path) -> None:
    """A stick holds a link where metadata should be, to make a signer's tools read, or write, somewhere else."""
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    for name in ("metadata/2.root.json", f"targets/{'0' * 64}.fleet.json", "pending"):
        link = copy.folder / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(secret)
        with refused("signing.archive_refused", ceremony.workspace.folder):
            import_workspace(ceremony.workspace, copy.folder, None, NOW)
        link.unlink()


def test_a_forged_signature_in_a_workspace(ceremony: Ceremony, copy: Workspace, tmp_path: Path) -> None:
    """A stick holds pending metadata with a made-up signature in the name of a signer, so that one more seems to do."""
    copy.add_package(make_package(tmp_path), days=365, now=NOW)
    copy.sign(ceremony.signers["dan"])
    path = copy.folder / "pending" / "2.targets.json"
    document = json.loads(path.read_bytes())
    forged = dict(document["signatures"][0], keyid=ceremony.signers["erin"].public_key.keyid)
    path.write_text(json.dumps({**document, "signatures": [*document["signatures"], forged]}))
    with refused("signing.import_unsigned", ceremony.workspace.folder):
        import_workspace(ceremony.workspace, copy.folder, None, NOW)


def test_a_root_of_the_attackers_own_in_a_workspace(ceremony: Ceremony, copy: Workspace, tmp_path: Path) -> None:
    """A stick holds a second root that hands everything to the attacker, signed with the attacker's keys alone."""
    root = parse_root((copy.folder / "metadata" / "1.root.json").read_bytes())
    (tmp_path / "other").mkdir()
    stranger = make_ceremony(tmp_path / "other")
    theirs = stranger.workspace.pending_root()
    assert theirs is not None
    theirs.signed.version = 2
    theirs.signatures.clear()
    for name in ("alice", "bob"):
        theirs.sign(stranger.signers[name], append=True)
    (copy.folder / "metadata" / "2.root.json").write_bytes(to_bytes(theirs))
    with refused("registry.threshold_unmet", ceremony.workspace.folder):
        import_workspace(ceremony.workspace, copy.folder, None, NOW)
    assert root.signed.version == 1


def test_a_target_with_other_content_in_a_workspace(ceremony: Ceremony, copy: Workspace, tmp_path: Path) -> None:
    """A stick holds a fleet.json with the attacker's keys under the name of the one that was signed."""
    (path,) = (copy.folder / "targets").glob("*.fleet.json")
    document = json.loads(path.read_bytes())
    document["keys"][0]["public"] = SigningKey.generate().public_hex
    path.write_text(json.dumps(document))
    with refused("registry.target_changed", ceremony.workspace.folder):
        import_workspace(ceremony.workspace, copy.folder, None, NOW)


# --- who made the model ----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package whose files their maker signed."""
    sources = write_files(tmp_path / "model")
    return pack(draft_of(*FILES), sources, tmp_path / "package", NOW, makers_signature())


def test_a_tampered_bundle(tmp_path: Path) -> None:
    """The maker's bundle is changed so that it lists the attacker's file in place of the maker's."""
    real = makers_signature()
    files = {**FILES, "model.gguf": b"a model of the attacker's"}
    forged = json.loads(real.bundle)
    other = json.loads(Maker().sign(files).bundle)
    forged["dsseEnvelope"]["payload"] = other["dsseEnvelope"]["payload"]
    signature = MakersSignature(json.dumps(forged).encode(), real.public_key_pem)
    sources = write_files(tmp_path / "model", files)
    with refused("provenance.bad_signature", tmp_path):
        pack(draft_of(*files), sources, tmp_path / "package", NOW, signature)


def test_an_extra_file_beside_the_signed_ones(tmp_path: Path) -> None:
    """A file that the maker never signed, such as a second tokenizer, rides along with the signed ones."""
    files = {**FILES, "tokenizer/extra.txt": b"of the attacker's"}
    sources = write_files(tmp_path / "model", files)
    with refused("provenance.files_differ", tmp_path):
        pack(draft_of(*files), sources, tmp_path / "package", NOW, makers_signature())


def test_a_link_in_a_package(package: Package, tmp_path: Path) -> None:
    """A blob of a package is a link to a file that the attacker changes after it was checked and before its upload."""
    blob = package.blobs[-1].path
    elsewhere = tmp_path / "elsewhere"
    os.rename(blob, elsewhere)
    blob.symlink_to(elsewhere)
    with refused("package.blob_is_link", tmp_path):
        open_package(package.folder)


def test_a_manifest_that_claims_another_maker(
    ceremony: Ceremony, registry: PublishedRegistry, package: Package
) -> None:
    """Both release signers are made to sign a manifest whose model signature nobody verified; the controller does."""
    registry.upload_blobs(package)
    document = json.loads(package.manifest_bytes)
    document["provenance"]["signature"]["public_key_pem"] = Maker().pem.decode()
    _sign_manifest(ceremony, document)
    attacked(ceremony, registry, "provenance.bad_signature")


def test_a_manifest_that_borrows_another_models_signature(
    ceremony: Ceremony, registry: PublishedRegistry, package: Package, tmp_path: Path
) -> None:
    """A genuine model signature is put into the manifest of other files, and both release signers sign that."""
    other = make_package(tmp_path, "large", content=b"a model of the attacker's")
    for one in (package, other):
        registry.upload_blobs(one)
    document = json.loads(other.manifest_bytes)
    document["provenance"] = json.loads(package.manifest_bytes)["provenance"]
    _sign_manifest(ceremony, document)
    attacked(ceremony, registry, "provenance.files_differ")


# --- metadata that outlives its signers ------------------------------------------------------------------------------


def test_signatures_on_another_version_of_the_metadata(ceremony: Ceremony, registry: PublishedRegistry) -> None:
    """Signatures of both release signers are moved from the published targets to a later version that drops a floor."""
    published = registry.registry.store.published()
    assert published is not None
    later = parse_targets(published.targets_bytes)
    later.signed.version += 1
    later.signed.expires += timedelta(days=3650)
    assert FLEET_TARGET in later.signed.targets
    with refused("registry.threshold_unmet", registry.folder):
        registry.registry.accept_metadata(Upload(targets=to_bytes(later)), "id-mallory", "mallory", NOW)


_ONLINE = ("snapshot", "timestamp", "director", "receipt", "log")


def _no_secret(_what: str) -> str:
    return ""


def _public(path: Path) -> SSlibKey:
    return public_key(SigningKey.load(path).public_hex, path.stem)


def _sign_manifest(ceremony: Ceremony, document: dict[str, object]) -> None:
    """Let both release signers sign a manifest that no tool of ours would have prepared."""
    data = json.dumps(document).encode()
    path = target_path(str(document["name"]), str(document["version"]))
    draft = ceremony.workspace.current_targets()
    draft.signed.version += 1
    draft.signatures.clear()
    target = TargetFile.from_data(path, data, ["sha256"])
    draft.signed.targets[path] = target
    ceremony.workspace.record_target(target, data)
    for name in ("dan", "erin"):
        draft.sign(ceremony.signers[name], append=True)
    write_durable(ceremony.workspace.folder / "pending" / f"{draft.signed.version}.targets.json", to_bytes(draft))
