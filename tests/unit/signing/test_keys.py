from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from securesystemslib.signer import SSlibKey

from garrison_controller.signing.keys import generate_key, load_public, load_signer, signer_name
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, RefusedError
from garrison_protocol.keys import SigningKey
from tests.fakes.ceremony import PASSPHRASE


def test_a_key_is_encrypted_private_and_signs_as_its_public_half(tmp_path: Path) -> None:
    files = generate_key("alice", tmp_path / "keys", PASSPHRASE)

    assert stat.S_IMODE(files.private_path.stat().st_mode) == 0o600
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in files.private_path.read_bytes()
    public = load_public(files.public_path)
    assert (public.keyid, signer_name(public)) == (files.keyid, "alice")
    signature = load_signer(files.private_path, PASSPHRASE).sign(b"payload")
    public.verify_signature(signature, b"payload")


def test_the_key_id_is_securesystemslibs_own(tmp_path: Path) -> None:
    files = generate_key("alice", tmp_path, PASSPHRASE)
    private = serialization.load_pem_private_key(files.private_path.read_bytes(), PASSPHRASE.encode())

    assert SSlibKey.from_crypto(private.public_key()).keyid == files.keyid


def test_a_wrong_passphrase_is_refused_by_its_own_code(tmp_path: Path) -> None:
    files = generate_key("alice", tmp_path, PASSPHRASE)

    with pytest.raises(RefusedError) as caught:
        load_signer(files.private_path, "correct horse batterie")
    assert (caught.value.code, caught.value.exit_status) == ("signing.wrong_passphrase", 6)


def test_keys_that_are_no_signers_keys_are_refused(tmp_path: Path) -> None:
    plain, other = tmp_path / "plain.key", tmp_path / "other.key"
    SigningKey.generate().save(plain)
    other.write_text("hello")
    other.chmod(0o600)

    for path in (plain, other):
        with pytest.raises(InvalidError) as caught:
            load_signer(path, PASSPHRASE)
        assert caught.value.code == "signing.key_malformed"
    with pytest.raises(GarrisonError) as missing:
        load_signer(tmp_path / "none.key", PASSPHRASE)
    assert missing.value.code == "signing.key_missing"


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    files = generate_key("alice", tmp_path, PASSPHRASE)
    files.private_path.chmod(0o644)

    with pytest.raises(RefusedError) as caught:
        load_signer(files.private_path, PASSPHRASE)
    assert caught.value.code == "key.readable_by_others"


@pytest.mark.parametrize(
    ("name", "passphrase", "code"),
    [("Alice!", PASSPHRASE, "signing.name_invalid"), ("alice", "short", "signing.passphrase_short")],
)
def test_bad_names_and_short_passphrases_make_no_key(tmp_path: Path, name: str, passphrase: str, code: str) -> None:
    with pytest.raises(InvalidError) as caught:
        generate_key(name, tmp_path, passphrase)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    before = generate_key("alice", tmp_path, PASSPHRASE).private_path.read_bytes()

    with pytest.raises(ConflictError):
        generate_key("alice", tmp_path, PASSPHRASE)
    assert (tmp_path / "alice.key").read_bytes() == before


def test_a_stated_key_id_is_not_believed(tmp_path: Path) -> None:
    files = generate_key("alice", tmp_path, PASSPHRASE)
    document = json.loads(files.public_path.read_text())
    files.public_path.write_text(json.dumps({**document, "keyid": "0" * 64}))

    assert load_public(files.public_path).keyid == files.keyid


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "a", "key": {"keytype": "rsa", "scheme": "x"}}', "\x00"])
def test_a_damaged_public_key_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "alice.pub.json"
    path.write_text(text)

    with pytest.raises(InvalidError) as caught:
        load_public(path)
    assert caught.value.code == "signing.key_malformed"
