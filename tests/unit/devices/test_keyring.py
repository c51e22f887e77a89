from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from garrison_controller.config import ControllerConfig, KeysConfig, load_config
from garrison_controller.devices import pki, rotation
from garrison_controller.devices.keyring import (
    ONLINE_KEYS,
    PASSPHRASE_CREDENTIAL,
    KeyStore,
    LiveKey,
    find_passphrase,
    open_keyring,
    read_passphrase,
)
from garrison_protocol.envelope import seal, unseal
from garrison_protocol.errors import GarrisonError
from garrison_protocol.keys import SigningKey

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
ONE, TWO = b"correct horse battery", b"staple of the second kind"


def secret(path: Path, text: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text)
    path.chmod(mode)
    return path


@pytest.fixture
def config(tmp_path: Path) -> ControllerConfig:
    return ControllerConfig(state_dir=tmp_path / "state", public_url="https://fleet.example:8443")


def with_passphrase(config: ControllerConfig, path: Path) -> ControllerConfig:
    return config.model_copy(update={"keys": KeysConfig(passphrase_file=path)})


def private_files(config: ControllerConfig) -> list[Path]:
    return [*config.keys_dir.glob("*.key"), *config.pki_dir.glob("*-ca.key")]


def test_every_key_but_those_for_tls_is_encrypted(config: ControllerConfig, tmp_path: Path) -> None:
    config = with_passphrase(config, secret(tmp_path / "pass", ONE + b"\n"))
    pki.initialise(config, NOW, find_passphrase(config))

    files = [*config.keys_dir.iterdir(), *config.pki_dir.glob("*.key")]
    encrypted = {path.name for path in files if b"BEGIN ENCRYPTED" in path.read_bytes()}
    assert encrypted == {f"{name}.key" for name in (*ONLINE_KEYS, "device-ca", "server-ca")}
    assert pki.load_online_keys(config).director.public_hex in pki.online_path(config).read_text()
    assert pki.load_authority(config, pki.DEVICE_CA).pem == (config.pki_dir / "device-ca.pem").read_text()


@pytest.mark.parametrize(
    ("text", "mode", "code"),
    [
        (ONE, 0o640, "key.readable_by_others"),
        (b"too short\n" + ONE, 0o600, "key.passphrase_short"),
        (b"", 0o600, "key.passphrase_short"),
        (TWO, 0o600, "key.wrong_passphrase"),
    ],
)
def test_a_passphrase_that_cannot_be_used(
    config: ControllerConfig, tmp_path: Path, text: bytes, mode: int, code: str
) -> None:
    pki.initialise(config, NOW, ONE)
    with pytest.raises(GarrisonError) as caught:
        pki.load_online_keys(with_passphrase(config, secret(tmp_path / "pass", text, mode)))
    assert caught.value.code == code


def test_a_missing_passphrase_file_and_a_missing_key(config: ControllerConfig, tmp_path: Path) -> None:
    pki.initialise(config, NOW)
    with pytest.raises(GarrisonError, match=r"key\.passphrase_missing"):
        pki.load_online_keys(with_passphrase(config, tmp_path / "none"))
    (config.keys_dir / "log.key").unlink()
    with pytest.raises(GarrisonError, match=r"key\.missing.*log\.key"):
        pki.load_online_keys(config)
    secret(config.keys_dir / "log.key", b"no key")
    with pytest.raises(GarrisonError, match=r"key\.wrong_type"):
        pki.load_online_keys(config)


def test_systemds_credentials(config: ControllerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert find_passphrase(config) is None
    secret(credentials / PASSPHRASE_CREDENTIAL, ONE, 0o400)
    pki.initialise(config, NOW, find_passphrase(config))
    director = pki.load_online_keys(config).director.public_hex

    # A key as a credential: systemd guards it, so it may be plain.
    plain = KeyStore(config.keys_dir, ONE).load_ed25519("director")
    (config.keys_dir / "director.key").unlink()
    SigningKey(plain).save(credentials / "director.key")
    assert pki.load_online_keys(config).director.public_hex == director
    (credentials / "director.key").chmod(0o644)
    with pytest.raises(GarrisonError, match=r"key\.readable_by_others"):
        pki.load_online_keys(config)


def test_the_configured_file_comes_before_the_credential(
    config: ControllerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    secret(tmp_path / PASSPHRASE_CREDENTIAL, ONE)
    assert find_passphrase(with_passphrase(config, secret(tmp_path / "pass", TWO))) == TWO


def test_a_relative_passphrase_file_is_beside_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text('state_dir = "state"\npublic_url = "https://a:1"\n[keys]\npassphrase_file = "pass"\n')
    assert load_config(file).keys.passphrase_file == tmp_path / "pass"
    file.write_text('state_dir = "/state"\npublic_url = "https://a:1"\n[keys]\npassphrase_file = "/pass"\n')
    assert (load_config(file).state_dir, load_config(file).keys.passphrase_file) == (Path("/state"), Path("/pass"))


def test_plain_keys_are_encrypted_later_and_the_passphrase_changed(config: ControllerConfig, tmp_path: Path) -> None:
    pki.initialise(config, NOW)
    director = pki.load_online_keys(config).director.public_hex
    rotation.stage(config, "director")
    assert len(rotation.encrypt(config, None, ONE)) == len(private_files(config)) == 8
    assert rotation.encrypt(config, None, ONE) == []
    with pytest.raises(GarrisonError, match=r"key\.passphrase_missing"):
        rotation.encrypt(config, None, TWO)
    with pytest.raises(GarrisonError, match=r"key\.wrong_passphrase"):
        rotation.encrypt(config, b"another one altogether", TWO)
    assert len(rotation.encrypt(config, ONE, TWO)) == 8

    config = with_passphrase(config, secret(tmp_path / "pass", TWO))
    assert pki.load_online_keys(config).director.public_hex == director
    assert {path.stat().st_mode & 0o777 for path in private_files(config)} == {0o600}


def test_an_interrupted_encryption_is_ended_by_the_next(config: ControllerConfig) -> None:
    pki.initialise(config, NOW, ONE)
    path = config.keys_dir / "receipt.key"
    private = KeyStore(config.keys_dir, ONE).load_ed25519("receipt")
    path.unlink()
    SigningKey(private).save(path, TWO)
    assert path not in rotation.encrypt(config, ONE, TWO)
    assert KeyStore(config.keys_dir, TWO).load_ed25519("director")


def test_a_rotation_that_was_cut_off_leaves_a_whole_key_or_none(
    config: ControllerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a key in its place would stop all publishing, and neither be kept nor be discarded."""
    pki.initialise(config, NOW)

    def cut_off(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        path.chmod(0o600)
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr("garrison_controller.devices.pki.write_private_file", cut_off)
        patch.setattr("garrison_protocol.keys.write_private_file", cut_off)
        with pytest.raises(OSError, match="the power went"):
            rotation.stage(config, "timestamp")
    keys = open_keyring(config)
    assert keys.signers().staged_timestamp is None
    public = rotation.stage(config, "timestamp")
    assert keys.signers().staged_timestamp is not None
    assert rotation.stage(config, "timestamp") == public


def test_a_staged_key_needs_the_right_passphrase(config: ControllerConfig, tmp_path: Path) -> None:
    pki.initialise(config, NOW, ONE)
    with pytest.raises(GarrisonError, match=r"key\.wrong_passphrase"):
        rotation.stage(with_passphrase(config, secret(tmp_path / "pass", TWO)), "director")
    assert not (config.keys_dir / "director.next.key").exists()


def test_an_envelope_is_of_one_key_while_keys_are_switched() -> None:
    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    live = LiveKey(keys[0])
    public = {SigningKey(key).key_id: SigningKey(key).public_hex for key in keys}
    done = threading.Event()

    def switch() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            live.switch(keys[turn % 2])

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for number in range(500):
            body = b"%d" % number
            assert unseal(seal("status", body, live), public.get).body == body
    finally:
        done.set()
        thread.join()


def test_a_passphrase_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    assert read_passphrase(secret(tmp_path / "pass", ONE + b" \r\nsecond line\n")) == ONE


def test_what_is_written_later_belongs_to_the_controller_also_when_root_writes_it(config: ControllerConfig) -> None:
    pki.initialise(config, NOW)
    owner = (12345, 12346) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for folder in (config.state_dir, config.keys_dir, config.pki_dir):
        os.chown(folder, *owner)
    rotation.stage(config, "director")
    rotation.encrypt(config, None, ONE)
    for path in (*private_files(config), pki.online_path(config)):
        assert (path.stat().st_uid, path.stat().st_gid) == owner, path
