"""The controller's keys and certificates on disk: created once, by ``garrison serve init``.

``keys/`` holds the online Ed25519 keys, ``pki/`` the two authorities and what they signed for the controller itself;
``online.json`` is what the signing ceremony needs of both. Private keys are PKCS#8, 0600, and encrypted where there is
a passphrase; but for those of the two TLS certificates, which the broker and its clients must be able to read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from garrison_controller.config import ControllerConfig
from garrison_controller.devices.ca import SERVER_DAYS, Authority, private_pem
from garrison_controller.devices.keyring import ONLINE_KEYS, Keyring, key_store, open_keyring
from garrison_protocol.errors import ConflictError, NotFoundError
from garrison_protocol.keys import SigningKey, write_private_file

DEVICE_CA = "device-ca"
SERVER_CA = "server-ca"
SERVER = "server"
CLIENT = "controller"
REVOCATION_LIST = "device-ca.crl"
ONLINE = "online.json"


def initialise(config: ControllerConfig, now: datetime, passphrase: bytes | None = None) -> Path:
    """Create every key and certificate under ``state_dir`` and return the path of ``online.json``.

    Private keys are encrypted if there is a ``passphrase``.

    Raises:
        ConflictError: ``controller.initialised``; keys are never replaced.
    """
    online = online_path(config)
    if config.keys_dir.exists() or config.pki_dir.exists():
        raise ConflictError(
            "controller.initialised",
            f"{config.state_dir} holds keys already",
            hint="start it with `garrison serve run`, or name another state_dir"
            if online.is_file()
            else "without online.json: restore that, or, if `serve init` was cut off, begin in another state_dir",
        )
    for folder in (config.state_dir, config.keys_dir, config.pki_dir, config.metadata_dir, config.blobs_dir):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    public = {}
    for purpose in ONLINE_KEYS:
        key = SigningKey.generate()
        key.save(config.keys_dir / f"{purpose}.key", passphrase)
        public[purpose] = key.public_hex
    device_ca = _create_authority(config.pki_dir, DEVICE_CA, "Garrison device CA", now, passphrase)
    server_ca = _create_authority(config.pki_dir, SERVER_CA, "Garrison server CA", now, passphrase)
    issue_own(config, device_ca, server_ca, now)
    write_revocation_list(config.pki_dir, [device_ca], (), now)
    document = {**public, "device_ca": device_ca.pem, "server_ca": server_ca.pem}
    replace_file(online, (json.dumps(document, indent=2) + "\n").encode(), 0o644)
    return online


def issue_own(config: ControllerConfig, device_ca: Authority, server_ca: Authority, now: datetime) -> None:
    """Write a new server key and certificate, and a new client certificate for the broker, for 825 days.

    The broker may use the server certificate too: it names the broker's hosts as well.
    """
    names = [config.public_host, config.board_mqtt[0], config.mqtt.host, *config.http.names]
    key = ec.generate_private_key(ec.SECP256R1())
    server = server_ca.issue_server([name for name in names if name], key.public_key(), SERVER_DAYS, now)
    _replace_pair(config.pki_dir, SERVER, key, server.pem)
    key = ec.generate_private_key(ec.SECP256R1())
    client = device_ca.issue_client(config.mqtt.identity, key.public_key(), SERVER_DAYS, now)
    _replace_pair(config.pki_dir, CLIENT, key, client.pem)


def load_online_keys(config: ControllerConfig) -> Keyring:
    """Return the controller's signing keys.

    Raises:
        NotFoundError: ``controller.not_initialised``, ``key.missing``, ``key.passphrase_missing``.
        RefusedError: ``key.readable_by_others``, ``key.wrong_passphrase``, ``key.not_encrypted``.
        InvalidError: ``key.passphrase_short``.
    """
    check_initialised(config)
    return open_keyring(config)


def load_authority(config: ControllerConfig, name: str) -> Authority:
    """Return ``DEVICE_CA`` or ``SERVER_CA``, the one in force; errors as ``load_online_keys``."""
    check_initialised(config)
    return Authority.of(key_store(config, config.pki_dir).load(name), config.pki_dir / f"{name}.pem")


def check_initialised(config: ControllerConfig) -> None:
    """Return if ``initialise`` has ended once.

    Raises:
        NotFoundError: ``controller.not_initialised``.
    """
    if not online_path(config).is_file():
        raise NotFoundError(
            "controller.not_initialised",
            f"{config.state_dir} holds no controller",
            hint="create one with `garrison serve init --config FILE`",
        )


def online_path(config: ControllerConfig) -> Path:
    """Return where the public halves of the controller's keys are kept for the ceremony."""
    return config.state_dir / ONLINE


def write_revocation_list(
    folder: Path, authorities: Iterable[Authority], revoked: Collection[tuple[str, datetime]], now: datetime
) -> None:
    """Replace the file of revocation lists that the broker reads (on SIGHUP): one by each of ``authorities``.

    Each names every serial number in ``revoked``: these are too long to meet by chance.
    """
    lists = b"".join(authority.revocation_list(revoked, now) for authority in authorities)
    replace_file(folder / REVOCATION_LIST, lists, 0o644)


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Put ``data`` in place of ``path`` atomically and durably; what root writes belongs to the folder's owner."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    write_private_file(fresh, data)
    fresh.chmod(mode)
    give_to_owner(fresh)
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def give_to_owner(path: Path) -> None:
    """Let a file that root wrote belong to whom its folder belongs: the controller must be able to read its keys."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _create_authority(folder: Path, file_name: str, title: str, now: datetime, passphrase: bytes | None) -> Authority:
    authority = Authority.create(title, now)
    write_private_file(folder / f"{file_name}.key", authority.key_pem(passphrase))
    replace_file(folder / f"{file_name}.pem", authority.pem.encode(), 0o644)
    return authority


def _replace_pair(folder: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate_pem: str) -> None:
    replace_file(folder / f"{name}.key", private_pem(key), 0o600)
    replace_file(folder / f"{name}.pem", certificate_pem.encode(), 0o644)
