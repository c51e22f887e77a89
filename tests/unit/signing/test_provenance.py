from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from garrison_controller.signing.packing import MakersSignature, Package, open_package, pack
from garrison_controller.signing.provenance import check_signature, verify_bundle
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError, RefusedError
from tests.fakes.ceremony import NOW, draft
from tests.fakes.makers import CURVES, FILES, Maker, draft_of, makers_signature, write_files


def packed(folder: Path, signature: MakersSignature, files: dict[str, bytes] = FILES) -> Package:
    return pack(draft_of(*files), dict(write_files(folder / "m", files)), folder / "out", NOW, signature)


@pytest.mark.parametrize("curve", CURVES)
def test_a_real_bundle_of_model_signing_verifies(curve: str) -> None:
    signature = makers_signature(curve)
    listed = verify_bundle(signature.bundle, signature.public_key_pem)
    assert listed == {name: sha256_hex(data) for name, data in FILES.items()}


def test_a_package_keeps_the_bundle_and_names_the_key(tmp_path: Path) -> None:
    signature = makers_signature()
    package = packed(tmp_path, signature)

    stated = package.manifest.provenance.signature
    assert stated is not None
    assert (stated.bundle_sha256, stated.bundle_size) == (sha256_hex(signature.bundle), len(signature.bundle))
    kept = package.folder / "blobs" / stated.bundle_sha256
    assert kept.read_bytes() == signature.bundle
    assert stated.bundle_sha256 in {blob.sha256 for blob in package.blobs}
    public = serialization.load_pem_public_key(signature.public_key_pem.encode())
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert stated.key_sha256 == sha256_hex(der)
    check_signature(package.manifest, signature.bundle)


def test_variants_that_share_a_path_are_told_apart_by_their_names(tmp_path: Path) -> None:
    contents = {"small/model.gguf": b"small", "large/model.gguf": b"large"}
    variants = [
        {
            "name": name,
            "runtime": {"engine": "llama.cpp"},
            "memory_mb": 1,
            "files": [{"path": "model.gguf", "chunk_size": 4096}],
        }
        for name in ("small", "large")
    ]
    paths = write_files(tmp_path / "m", contents)
    sources = {name.replace("/", ":"): path for name, path in paths.items()}
    package = pack(draft(variants=variants), sources, tmp_path / "out", NOW, Maker().sign(contents))
    assert package.manifest.provenance.signature is not None


@pytest.mark.parametrize(
    "files",
    [
        {**FILES, "extra.txt": b"one more"},
        {name: data for name, data in FILES.items() if name != "LICENSE"},
        {**FILES, "LICENSE": b"Proprietary"},
        {**{name: data for name, data in FILES.items() if name != "LICENSE"}, "LICENCE": FILES["LICENSE"]},
    ],
    ids=["one more", "one less", "changed", "renamed"],
)
def test_other_files_than_the_signed_ones_are_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(RefusedError) as caught:
        packed(tmp_path, makers_signature(), files)
    assert caught.value.code == "provenance.files_differ"
    assert not (tmp_path / "out").exists()


def test_another_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        packed(tmp_path, MakersSignature(makers_signature().bundle, Maker().pem.decode()))
    assert caught.value.code == "provenance.bad_signature"


def resources(statement: dict[str, Any]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = statement["predicate"]["resources"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["predicate"]["serialization"].update(method="shards"),
        lambda one: one["predicate"]["serialization"].update(hash_type="blake2b"),
        lambda one: one["predicate"]["serialization"].update(allow_symlinks=True),
        lambda one: one.update(predicateType="https://slsa.dev/provenance/v1"),
        lambda one: one["subject"][0]["digest"].update(sha256="0" * 64),
        lambda one: one.update(subject=[]),
        lambda one: resources(one).append(resources(one)[0]),
        lambda one: resources(one)[0].update(name="../LICENSE"),
        lambda one: resources(one)[0].update(algorithm="md5"),
        lambda one: resources(one)[0].update(digest="00"),
        lambda one: resources(one).clear(),
        lambda one: one.pop("predicate"),
    ],
)
def test_a_statement_that_says_something_else_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    signature = Maker().sign(change=change)
    with pytest.raises(GarrisonError) as caught:
        verify_bundle(signature.bundle, signature.public_key_pem)
    assert caught.value.code == "provenance.malformed"


@pytest.mark.parametrize("bundle", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"dsseEnvelope": {"payload": "?"}}'])
def test_what_is_no_bundle_is_refused(bundle: bytes) -> None:
    with pytest.raises(GarrisonError) as caught:
        verify_bundle(bundle, Maker().pem.decode())
    assert caught.value.code == "provenance.malformed"


def test_two_signatures_are_refused() -> None:
    signature = makers_signature()
    document = json.loads(signature.bundle)
    document["dsseEnvelope"]["signatures"] *= 2
    with pytest.raises(GarrisonError) as caught:
        verify_bundle(json.dumps(document).encode(), signature.public_key_pem)
    assert caught.value.code == "provenance.malformed"


def test_keys_that_model_signing_does_not_use_are_refused() -> None:
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for text in (pem.decode(), Maker(ec.SECP256K1()).pem.decode(), "no key", "-" * 5000):
        with pytest.raises(GarrisonError) as caught:
            verify_bundle(makers_signature().bundle, text)
        assert caught.value.code == "provenance.key_unsupported"


def test_a_draft_cannot_claim_a_signature(tmp_path: Path) -> None:
    claimed = packed(tmp_path, makers_signature()).manifest.provenance.model_dump(mode="json")
    document = json.loads(draft_of("model.gguf")) | {"provenance": claimed}
    source = write_files(tmp_path / "n", {"model.gguf": b"other"})
    with pytest.raises(GarrisonError) as caught:
        pack(json.dumps(document).encode(), dict(source), tmp_path / "claimed", NOW)
    assert caught.value.code == "package.draft_malformed"


def test_a_bundle_that_changed_in_the_package_is_noticed(tmp_path: Path) -> None:
    package = packed(tmp_path, makers_signature())
    stated = package.manifest.provenance.signature
    assert stated is not None
    (package.folder / "blobs" / stated.bundle_sha256).write_bytes(makers_signature().bundle + b" ")
    with pytest.raises(RefusedError) as caught:
        open_package(package.folder)
    assert caught.value.code == "provenance.files_differ"
