"""The controller's private keys: where each lies, what opens it, and which of two is in force.

A key is looked for as ``<name>.key`` in its folder, then among the credentials that systemd hands to the service. A
*staged* key, ``<name>.next.key``, waits until published metadata names it; then it takes the old one's place, while
the controller runs, and the old private key is gone (docs/security.md, "Rotating an online key").
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Root

from garrison_controller.config import ControllerConfig
from garrison_controller.registry.online import OnlineSigners
from garrison_controller.signing.metadata import sync_folder
from garrison_protocol.errors import InvalidError, NotFoundError, RefusedError
from garrison_protocol.fleet import Fleet
from garrison_protocol.keys import SigningKey, parse_private_key, refuse_if_readable_by_others
from garrison_protocol.states import KeyPurpose

ROLES = ("snapshot", "timestamp")
"""Online keys that root metadata names."""
PURPOSES = (KeyPurpose.DIRECTOR, KeyPurpose.RECEIPT, KeyPurpose.LOG)
"""Online keys that ``fleet.json`` names."""
ONLINE_KEYS = (*ROLES, *(purpose.value for purpose in PURPOSES))
PASSPHRASE_CREDENTIAL = "garrison-passphrase"  # noqa: S105 -- a file's name, not a secret
MIN_PASSPHRASE_BYTES = 16


@dataclass(frozen=True)
class KeyStore:
    """A folder of private keys, and what opens them."""

    folder: Path
    passphrase: bytes | None = None
    credentials: Path | None = None
    """Where systemd puts credentials; its files are protected by systemd, and need no passphrase."""

    def path(self, name: str) -> Path:
        """Return the file that is used for ``name``: the folder's own, or else a credential."""
        own = self.folder / f"{name}.key"
        given = None if self.credentials is None else self.credentials / own.name
        return given if given is not None and given.is_file() and not own.is_file() else own

    def load(self, name: str) -> PrivateKeyTypes:
        """Return the private key called ``name``.

        Raises:
            NotFoundError: ``key.missing``.
            RefusedError: ``key.readable_by_others``, ``key.passphrase_missing``, ``key.wrong_passphrase``,
                ``key.not_encrypted``, ``key.wrong_type``.
        """
        path = self.path(name)
        if not path.is_file():
            raise NotFoundError("key.missing", f"there is no key file {path}", hint="restore it from the backup")
        as_credential = path.parent == self.credentials
        _refuse_if_open(path, as_credential=as_credential)
        pem = path.read_bytes()
        plain = as_credential and b"BEGIN ENCRYPTED PRIVATE KEY" not in pem
        try:
            return parse_private_key(pem, None if plain else self.passphrase, path)
        except ValueError as error:
            raise RefusedError("key.wrong_type", f"{path} holds no private key", hint="restore it") from error

    def load_ed25519(self, name: str) -> Ed25519PrivateKey:
        """Return the Ed25519 key called ``name``; errors as ``load``."""
        private = self.load(name)
        if not isinstance(private, Ed25519PrivateKey):
            raise RefusedError("key.wrong_type", f"{self.path(name)} holds no Ed25519 key", hint="restore it")
        return private

    def staged(self, name: str) -> Ed25519PrivateKey | None:
        """Return the key that stands by to take the place of ``name``, if there is one; errors as ``load``."""
        staged = f"{name}.next"
        return self.load_ed25519(staged) if (self.folder / f"{staged}.key").is_file() else None

    def settle(self, name: str) -> None:
        """Let the staged key take the place of ``name`` on disk, durably; the old private key is gone."""
        (self.folder / f"{name}.next.key").replace(self.folder / f"{name}.key")
        sync_folder(self.folder)


class LiveKey(SigningKey):
    """A signing key that can be switched for another while whoever holds it goes on signing. Thread-safe."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        super().__init__(private)
        self._current = SigningKey(private)

    @property
    def public_hex(self) -> str:
        """The raw public key in hex, of the key in force."""
        return self._current.public_hex

    @property
    def key_id(self) -> str:
        """The id of the key in force."""
        return self._current.key_id

    def sign(self, data: bytes) -> bytes:
        """Return the signature of ``data`` by the key in force."""
        return self._current.sign(data)

    def signature(self, data: bytes) -> tuple[str, bytes]:
        """Return the id of the key in force and its signature, never of two different keys."""
        return self._current.signature(data)

    def switch(self, private: Ed25519PrivateKey) -> None:
        """Sign with ``private`` from now on."""
        self._current = SigningKey(private)
        self._private = private


class Keyring:
    """The online keys of one running controller."""

    def __init__(self, store: KeyStore) -> None:
        """Load every key.

        Raises:
            GarrisonError: As ``KeyStore.load``.
        """
        self.store = store
        self._lock = threading.Lock()
        self._live = {purpose: LiveKey(store.load_ed25519(purpose.value)) for purpose in PURPOSES}
        self._roles = {role: store.load_ed25519(role) for role in ROLES}

    @property
    def director(self) -> SigningKey:
        """What signs desired states and anchors; it stays valid when its key is switched."""
        return self._live[KeyPurpose.DIRECTOR]

    @property
    def receipt(self) -> SigningKey:
        """What signs receipts; likewise."""
        return self._live[KeyPurpose.RECEIPT]

    @property
    def log(self) -> SigningKey:
        """What signs checkpoints; likewise."""
        return self._live[KeyPurpose.LOG]

    def signers(self) -> OnlineSigners:
        """Return what signs snapshot and timestamp, staged keys included, as the files say now."""
        staged = {role: self.store.staged(role) for role in ROLES}
        with self._lock:
            active = dict(self._roles)
        return OnlineSigners(
            CryptoSigner(active["snapshot"]),
            CryptoSigner(active["timestamp"]),
            *(None if (key := staged[role]) is None else CryptoSigner(key) for role in ROLES),
        )

    def purposes(self) -> Mapping[KeyPurpose, Collection[str]]:
        """Return the raw public keys that ``fleet.json`` may name: for each purpose the active and the staged one."""
        found: dict[KeyPurpose, Collection[str]] = {}
        for purpose, live in self._live.items():
            staged = self.store.staged(purpose.value)
            found[purpose] = {live.public_hex} | (set() if staged is None else {public_hex(staged)})
        return found

    def adopt(self, root: Root, fleet: Fleet, now: datetime) -> list[str]:
        """Sign from now on with each staged key that published metadata names; return those names.

        Repeats nothing and forgets nothing: a name comes back until ``settle`` was called for it.
        """
        adopted = []
        for role in ROLES:
            staged = self.store.staged(role)
            if staged is not None and CryptoSigner(staged).public_key.keyid in root.roles[role].keyids:
                with self._lock:
                    self._roles[role] = staged
                adopted.append(role)
        for purpose, live in self._live.items():
            staged = self.store.staged(purpose.value)
            if staged is None:
                continue
            if fleet.public_key(purpose, SigningKey(staged).key_id, now) is not None:
                live.switch(staged)
                adopted.append(purpose.value)
        return adopted

    def settle(self, names: Iterable[str]) -> None:
        """Replace the old private keys of ``names`` on disk by those that ``adopt`` put in force."""
        for name in names:
            self.store.settle(name)


def open_keyring(config: ControllerConfig) -> Keyring:
    """Return the keyring of ``config``; errors as ``Keyring`` and ``find_passphrase``."""
    return Keyring(key_store(config, config.keys_dir))


def key_store(config: ControllerConfig, folder: Path) -> KeyStore:
    """Return the keys in ``folder`` with what opens them; errors as ``find_passphrase``."""
    return KeyStore(folder, find_passphrase(config), credentials_folder())


def public_hex(private: Ed25519PrivateKey) -> str:
    """Return the raw public key of ``private`` in hex."""
    return private.public_key().public_bytes_raw().hex()


def find_passphrase(config: ControllerConfig) -> bytes | None:
    """Return what opens the private keys: from the configured file, else the credential; None where there is neither.

    Raises:
        GarrisonError: As ``read_passphrase``.
    """
    if config.keys.passphrase_file is not None:
        return read_passphrase(config.keys.passphrase_file)
    credentials = credentials_folder()
    if credentials is None or not (credentials / PASSPHRASE_CREDENTIAL).is_file():
        return None
    return read_passphrase(credentials / PASSPHRASE_CREDENTIAL)


def read_passphrase(path: Path) -> bytes:
    """Return the first line of ``path``.

    Raises:
        NotFoundError: ``key.passphrase_missing``.
        RefusedError: ``key.readable_by_others``.
        InvalidError: ``key.passphrase_short``.
    """
    try:
        _refuse_if_open(path, as_credential=path.parent == credentials_folder())
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise NotFoundError(
            "key.passphrase_missing",
            f"cannot read the passphrase in {path}: {error.strerror}",
            hint="restore it; for a new controller, as its user: "
            f"(umask 077; head -c 32 /dev/urandom | base64 > {path})",
        ) from error
    passphrase = lines[0].strip() if lines else b""
    if len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise InvalidError(
            "key.passphrase_short",
            f"the passphrase in {path} has fewer than {MIN_PASSPHRASE_BYTES} characters",
            hint="nobody has to type it: `head -c 32 /dev/urandom | base64` makes a good one",
        )
    return passphrase


def credentials_folder() -> Path | None:
    """Return where systemd hands credentials to this service, if it does."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) if folder else None


def _refuse_if_open(path: Path, *, as_credential: bool) -> None:
    """Refuse a secret that others may read.

    systemd gives a credential to the service's user by an access list, whose mask shows as the bits of group root.
    """
    status = path.stat()
    if as_credential and (status.st_uid, status.st_gid) == (0, 0) and not status.st_mode & 0o007:
        return
    refuse_if_readable_by_others(path)
