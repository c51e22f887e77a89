"""Changing the controller's private keys: staged on its host, put in force once release signers have named them.

``stage``, ``discard``, and ``encrypt`` are for the controller's host, beside a running controller or without one;
``switch`` is the running controller's part. Each can be cut off at any point and run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Root

from garrison_controller.access.events import record_event
from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import pki
from garrison_controller.devices.keyring import ONLINE_KEYS, ROLES, Keyring, KeyStore, key_store, public_hex
from garrison_controller.registry.store import RegistryStore
from garrison_controller.rollouts import desired
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError
from garrison_protocol.fleet import FLEET_TARGET, Fleet, parse_fleet
from garrison_protocol.keys import SigningKey, private_key_pem
from garrison_protocol.states import KeyPurpose

CONTROLLER = "controller"
BATCH = 200
"""Desired states signed again in one transaction: others may write in between."""


def stage(config: ControllerConfig, purpose: str) -> str:
    """Make the key that shall take the place of ``purpose``, name it in ``online.json``, and return its public half.

    A key that is staged already is kept: release signers may have signed for it.

    Raises:
        InvalidError: ``key.purpose_unknown``.
        GarrisonError: As ``KeyStore.load``.
    """
    _check_purpose(purpose)
    pki.check_initialised(config)
    store = key_store(config, config.keys_dir)
    store.load(purpose)  # the passphrase opens the keys that are there? Then it will open the new one too
    staged = store.staged(purpose)
    if staged is None:
        staged = Ed25519PrivateKey.generate()
        # Whole or not at all: half a key here would stop all publishing, and a running controller reads it at any time.
        path = config.keys_dir / f"{purpose}.next.key"
        pki.replace_file(path, private_key_pem(staged, store.passphrase), 0o600)
    name_in_online(config, purpose, public_hex(staged))
    return public_hex(staged)


def discard(config: ControllerConfig, purpose: str) -> str:
    """Delete the staged key of ``purpose`` and return the public half of the one that stays.

    Raises:
        InvalidError: ``key.purpose_unknown``.
        ConflictError: ``key.nothing_staged``, ``key.published``.
        GarrisonError: As ``KeyStore.load``.
    """
    _check_purpose(purpose)
    store, registry = key_store(config, config.keys_dir), RegistryStore(config.metadata_dir)
    with registry.publishing():  # or a push could put the key in force meanwhile
        staged = store.staged(purpose)
        if staged is None:
            raise ConflictError("key.nothing_staged", f"no new {purpose} key waits", hint="`garrison serve rotate-key`")
        if _is_published(registry, purpose, public_hex(staged)):
            raise ConflictError(
                "key.published",
                f"published metadata names the new {purpose} key: without it boards would refuse this controller",
                hint="start the controller, which puts it in force; to be rid of it, rotate once more",
            )
        current = public_hex(store.load_ed25519(purpose))
        name_in_online(config, purpose, current)
        (config.keys_dir / f"{purpose}.next.key").unlink()
    return current


def encrypt(config: ControllerConfig, current: bytes | None, new: bytes) -> list[Path]:
    """Encrypt every private key of the controller with ``new``, and return the files that were changed.

    Keys may be plain, encrypted with ``current``, or with ``new`` already (an earlier try was cut off).

    Raises:
        GarrisonError: As ``KeyStore.load``.
    """
    pki.check_initialised(config)
    changed = []
    for path in _key_files(config):
        passphrases = [new, None, current]
        for passphrase in passphrases:
            store = KeyStore(path.parent, passphrase)
            try:
                private = store.load(path.name.removesuffix(".key"))
            except GarrisonError as error:
                if error.code.startswith("key.readable") or passphrase is passphrases[-1]:
                    raise
                continue
            if passphrase is not new:
                pki.replace_file(path, private_key_pem(private, new), 0o600)
                changed.append(path)
            break
    return changed


def switch(keyring: Keyring, database: Database, root: Root, fleet: Fleet, now: datetime) -> list[str]:
    """Put in force each staged key that ``root`` or ``fleet`` names, delete the old ones, and return their purposes.

    Desired states are signed again by a new director key; to boards that have them they are repetitions.
    """
    adopted = keyring.adopt(root, fleet, now)
    if KeyPurpose.DIRECTOR in adopted:
        resign_all(database, keyring.director)
    if adopted:
        with database.session() as session:
            for purpose in adopted:
                record_event(session, now, CONTROLLER, "key.switch", purpose)
        keyring.settle(adopted)  # last: until here a crash leaves the staged key, and all of this is done again
    return adopted


def resign_all(database: Database, director: SigningKey) -> None:
    """Let ``director`` sign every board's desired state that another key has signed."""
    last = ""
    while True:
        with database.session() as session:
            boards = desired.resign(session, director, after=last, limit=BATCH)
        if not boards:
            return
        last = boards[-1]


def _key_files(config: ControllerConfig) -> Iterator[Path]:
    yield from sorted(config.keys_dir.glob("*.key"))
    for name in (pki.DEVICE_CA, pki.SERVER_CA):
        yield from sorted(config.pki_dir.glob(f"{name}*.key"))


def _is_published(store: RegistryStore, purpose: str, public: str) -> bool:
    root, published = store.root(), store.published()
    if root is not None and purpose in ROLES:
        keys = (root.signed.keys[keyid] for keyid in root.signed.roles[purpose].keyids)
        return any(key.keyval.get("public") == public for key in keys)
    if published is None:
        return False
    fleet = parse_fleet(store.read_target(published.targets.signed.targets[FLEET_TARGET]))
    return any(key.purpose.value == purpose and key.public == public for key in fleet.keys)


def _check_purpose(purpose: str) -> None:
    if purpose not in ONLINE_KEYS:
        raise InvalidError(
            "key.purpose_unknown",
            f"{purpose!r} names no online key",
            hint=f"one of {', '.join((*ONLINE_KEYS, pki.SERVER_CA, pki.DEVICE_CA))}",
        )


def name_in_online(config: ControllerConfig, purpose: str, public: str) -> None:
    """Let ``online.json`` say ``public`` for ``purpose``, durably."""
    path = pki.online_path(config)
    document = json.loads(path.read_bytes())
    pki.replace_file(path, (json.dumps({**document, purpose: public}, indent=2) + "\n").encode(), 0o644)
