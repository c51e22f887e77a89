"""Who this board is: its keys, its certificate, and whom it talks to (docs/security.md, "Identity").

Everything lies in ``<state>/identity`` (private) and ``<state>/registry`` (the pinned root and server CA).
``device.json`` is written last: where it is missing, the board is not enrolled.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from garrison_agent.registry.files import sync_folder, write_atomic
from garrison_protocol.errors import GarrisonError, NotFoundError
from garrison_protocol.ids import DeviceId, Sha256
from garrison_protocol.keys import SigningKey, refuse_if_readable_by_others, write_private_file


class DeviceRecord(BaseModel):
    """``device.json``: what enrolment settled."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    device: DeviceId
    url: str
    mqtt_host: str
    mqtt_port: int
    token_sha256: Sha256
    """Of the one-time token, so that a repeated enrolment with it is known to be one."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Where identity and pinned trust lie below a state folder."""

    state: Path

    @property
    def identity(self) -> Path:
        """The private folder."""
        return self.state / "identity"

    @property
    def signing_key(self) -> Path:
        """The lasting Ed25519 identity key."""
        return self.identity / "identity.key"

    @property
    def tls_key(self) -> Path:
        """The P-256 key of the TLS certificate."""
        return self.identity / "tls.key"

    @property
    def tls_cert(self) -> Path:
        """The renewable TLS certificate."""
        return self.identity / "tls.pem"

    @property
    def record(self) -> Path:
        """``device.json``."""
        return self.identity / "device.json"

    @property
    def server_ca(self) -> Path:
        """The CA of the controller and the broker."""
        return self.state / "registry" / "server-ca.pem"

    @property
    def root(self) -> Path:
        """The pinned first TUF root."""
        return self.state / "registry" / "1.root.json"


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled board."""

    device: str
    signing_key: SigningKey
    tls_key_path: Path
    tls_cert_path: Path
    url: str
    mqtt_host: str
    mqtt_port: int
    server_ca_path: Path
    root_path: Path

    @classmethod
    def load(cls, state_dir: Path) -> Identity:
        """Return the identity stored below ``state_dir``.

        Raises:
            NotFoundError: ``identity.not_enrolled``.
            GarrisonError: ``identity.damaged``.
            RefusedError: ``key.readable_by_others``.
        """
        folders = Folders(state_dir)
        record = load_record(state_dir)
        if record is None:
            raise NotFoundError(
                "identity.not_enrolled",
                f"this board is not enrolled ({folders.record} does not exist)",
                hint="run `garrison-agent enroll` with the line that `garrison device token create` printed",
            )
        try:
            refuse_if_readable_by_others(folders.tls_key)
            signing_key = SigningKey.load(folders.signing_key)
        except (OSError, ValueError) as error:
            raise _damaged(folders.identity, error) from error
        return cls(
            device=record.device,
            signing_key=signing_key,
            tls_key_path=folders.tls_key,
            tls_cert_path=folders.tls_cert,
            url=record.url,
            mqtt_host=record.mqtt_host,
            mqtt_port=record.mqtt_port,
            server_ca_path=folders.server_ca,
            root_path=folders.root,
        )

    def mqtt_context(self) -> ssl.SSLContext:
        """Return TLS settings for the broker: the pinned server CA and this board's certificate.

        Raises:
            GarrisonError: ``identity.damaged``.
        """
        context = self.server_context()
        try:
            context.load_cert_chain(self.tls_cert_path, self.tls_key_path)
        except OSError as error:
            raise _damaged(self.tls_cert_path, error) from error
        return context

    def server_context(self) -> ssl.SSLContext:
        """Return TLS settings for the controller: the pinned server CA and nothing else; no client certificate.

        Raises:
            GarrisonError: ``identity.damaged``.
        """
        try:
            return pinned_context(self.server_ca_path)
        except OSError as error:
            raise _damaged(self.server_ca_path, error) from error


def pinned_context(server_ca: Path) -> ssl.SSLContext:
    """Return TLS settings that trust the CA in ``server_ca`` and no other.

    Raises:
        OSError: The file cannot be read or holds no certificate.
    """
    context = ssl.create_default_context(cafile=str(server_ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def load_record(state_dir: Path) -> DeviceRecord | None:
    """Return what enrolment settled, or None before it.

    Raises:
        GarrisonError: ``identity.damaged``.
    """
    path = Folders(state_dir).record
    try:
        return DeviceRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise _damaged(path, error) from error


def save_record(state_dir: Path, record: DeviceRecord) -> None:
    """Write ``device.json`` durably; from then on the board is enrolled."""
    write_atomic(Folders(state_dir).record, record.model_dump_json(indent=2).encode() + b"\n", mode=0o600)


def create_keys(state_dir: Path) -> tuple[SigningKey, bytes]:
    """Return the identity key and the TLS key (PKCS#8 PEM), made here unless an earlier, cut-off try left them.

    Raises:
        RefusedError: ``key.readable_by_others``.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folders = Folders(state_dir)
    folders.identity.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not folders.signing_key.exists():
        _put(folders.signing_key, SigningKey.generate().save)
    if not folders.tls_key.exists():
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _put(folders.tls_key, lambda path: write_private_file(path, pem))
    refuse_if_readable_by_others(folders.tls_key)
    return SigningKey.load(folders.signing_key), folders.tls_key.read_bytes()


def _put(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make ``path`` so that it is there whole or not at all."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    write(unfinished)
    os.rename(unfinished, path)
    sync_folder(path.parent)


def _damaged(path: Path, error: Exception) -> GarrisonError:
    return GarrisonError(
        "identity.damaged",
        f"{path} cannot be used: {error}",
        hint="restore it, or move the identity folder away and enrol the board again",
    )
