from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from garrison_controller.signing.key_uris import import_key, is_uri, open_uri
from garrison_controller.signing.keys import load_public, signer_name
from garrison_protocol.errors import GarrisonError
from garrison_protocol.keys import SigningKey, private_key_pem, write_private_file
from tests.fakes.ceremony import Ceremony, make_ceremony


def nobody(_what: str) -> str:
    raise AssertionError("nothing is asked for")


def written(path: Path, key: PrivateKeyTypes) -> str:
    write_private_file(path, private_key_pem(key, None))
    return f"file2:{path}"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=lambda curve: curve.name)
def test_a_key_of_another_tool_is_imported_and_signs(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    uri = written(tmp_path / "key", ec.generate_private_key(curve))
    files = import_key("alice", uri, tmp_path / "keys", nobody)
    public = load_public(files.public_path)

    assert (public.keyid, signer_name(public)) == (files.keyid, "alice")
    public.verify_signature(open_uri(uri, public, nobody).sign(b"payload"), b"payload")
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["alice.pub.json"]


def test_an_ed25519_key_keeps_its_id(tmp_path: Path) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    files = import_key("alice", f"file2:{tmp_path / 'key'}", tmp_path, nobody)
    assert load_public(files.public_path).keyval["public"] == key.public_hex


def test_the_public_half_of_a_key_service_comes_as_pem(tmp_path: Path) -> None:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    uri = "gcpkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"
    with pytest.raises(GarrisonError) as caught:
        import_key("alice", uri, tmp_path, nobody)
    assert caught.value.code == "signing.key_uri_malformed"
    assert load_public(import_key("alice", uri, tmp_path, nobody, pem).public_path).scheme == "ecdsa-sha2-nistp256"


def test_keys_that_boards_do_not_verify_are_refused(tmp_path: Path) -> None:
    keys: tuple[PrivateKeyTypes, ...] = (
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
    )
    for number, key in enumerate(keys):
        with pytest.raises(GarrisonError) as caught:
            import_key("alice", written(tmp_path / f"{number}.key", key), tmp_path, nobody)
        assert caught.value.code == "signing.key_unusable"
    assert not (tmp_path / "alice.pub.json").exists()


def test_a_uri_that_leads_nowhere(tmp_path: Path) -> None:
    for uri, code in (
        ("gnupg:ABCD", "signing.key_uri_malformed"),
        (f"file2:{tmp_path}/none", "signing.key_missing"),
        ("hsm:two", "signing.key_unusable"),
    ):
        with pytest.raises(GarrisonError) as caught:
            import_key("alice", uri, tmp_path, nobody)
        assert caught.value.code == code
    assert [is_uri(one) for one in ("hsm:", "file2:a", "keys/alice.key", "C:key", "hsm")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    return make_ceremony(tmp_path)


def test_a_key_that_is_not_the_named_one_signs_nothing(ceremony: Ceremony, tmp_path: Path) -> None:
    uri = written(tmp_path / "key", ec.generate_private_key(ec.SECP256R1()))
    alice = load_public(tmp_path / "keys" / "alice.pub.json")
    with pytest.raises(GarrisonError) as caught:
        open_uri(uri, alice, nobody)
    assert caught.value.code == "signing.key_unusable"
