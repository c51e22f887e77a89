"""Who this board is: its keys, its certificate, and whom it talks to (docs/security.md, "Identity").

Everything lies in ``<state>/identity`` (private) and ``<state>/registry`` (the pinned root and server CA).
``device.json`` is written last: where it is missing, the board is not enrolled.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from garrison_agent.registry.files import disk_errors, sync_folder, write_atomic
from garrison_agent.tls import JudgeAt, PinnedContext, pinned_context
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError
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
    """Of the token, or of what stood in its place, so that a repeated enrolment with it is known to be one."""


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
        """The P-256 key of an enrolment that is under way; afterwards the key lies in ``tls_pair``."""
        return self.identity / "tls.key"

    @property
    def tls_pair(self) -> Path:
        """The renewable TLS certificate and its key: one file, so that they cannot come apart."""
        return self.identity / "tls.pem"

    @property
    def record(self) -> Path:
        """``device.json``."""
        return self.identity / "device.json"

    @property
    def offline_request(self) -> Path:
        """The request of an offline enrolment; its nonce is the one of ``anchor``."""
        return self.identity / "offline.json"

    @property
    def anchor(self) -> Path:
        """The anchor that came with an offline enrolment; nothing of it is verified."""
        return self.state / "registry" / "enrolment-anchor.dsse"

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
    url: str
    mqtt_host: str
    mqtt_port: int
    state_dir: Path

    @property
    def folders(self) -> Folders:
        """Where its files lie."""
        return Folders(self.state_dir)

    @property
    def server_ca_path(self) -> Path:
        """The pinned CA of controller and broker."""
        return self.folders.server_ca

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
            with contextlib.suppress(FileNotFoundError):  # a renewal makes a new one
                refuse_if_readable_by_others(folders.tls_pair)
            signing_key = SigningKey.load(folders.signing_key)
        except (OSError, ValueError) as error:
            raise _damaged(folders.identity, error) from error
        return cls(
            device=record.device,
            signing_key=signing_key,
            url=record.url,
            mqtt_host=record.mqtt_host,
            mqtt_port=record.mqtt_port,
            state_dir=state_dir,
        )

    def broker(self) -> tuple[str, int]:
        """Return the broker's host and port, read again: a renewal may have brought others.

        Raises:
            GarrisonError: ``identity.damaged``.
        """
        record = load_record(self.state_dir)
        return (self.mqtt_host, self.mqtt_port) if record is None else (record.mqtt_host, record.mqtt_port)

    def mqtt_context(self, judge_at: JudgeAt) -> PinnedContext:
        """Return TLS settings for the broker: the pinned server CA and this board's certificate, both read again.

        Raises:
            GarrisonError: ``identity.damaged``.
            RefusedError: ``key.readable_by_others``.
        """
        context = self.server_context(judge_at)
        pair = self.folders.tls_pair
        try:
            refuse_if_readable_by_others(pair)
            context.load_cert_chain(pair)
        except OSError as error:
            raise _damaged(pair, error) from error
        return context

    def server_context(self, judge_at: JudgeAt) -> PinnedContext:
        """Return TLS settings for the controller: the pinned server CA and nothing else; no client certificate.

        Raises:
            GarrisonError: ``identity.damaged``.
        """
        try:
            return pinned_context(self.server_ca_path, judge_at)
        except OSError as error:
            raise _damaged(self.server_ca_path, error) from error


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


def save_pair(state_dir: Path, pem: bytes) -> None:
    """Replace the TLS certificate and its key at once, durably: whenever it is cut off, an old or a new pair is there.

    Raises:
        InsufficientError: ``disk.full``.
        UnavailableError: ``disk.failed``.
    """
    write_atomic(Folders(state_dir).tls_pair, pem, mode=0o600)


def pin_server_ca(state_dir: Path, pem: str) -> bool:
    """Trust the CAs in ``pem``, from a verified ``fleet.json``, in place of those pinned so far, durably.

    True: one of those is no longer trusted. The next connection goes by the new file; empty ``pem`` changes nothing.

    Raises:
        InvalidError: ``fleet.server_ca_unusable``; the old file stays.
        InsufficientError: ``disk.full``.
        UnavailableError: ``disk.failed``.
    """
    path = Folders(state_dir).server_ca
    with disk_errors(path):
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if pem in ("", before):
        return False
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidError(
            "fleet.server_ca_unusable",
            f"fleet.json's server CA cannot be used: {error}",
            hint="the release signers must publish a fleet.json with the controller's CA; the pinned one stays",
        ) from error
    write_atomic(path, pem.encode())
    return not _certificates(before) <= _certificates(pem)


def _certificates(pem: str) -> set[str]:
    """Return the certificates in ``pem``, each as its text."""
    begun = (part.partition("-----END CERTIFICATE-----")[0] for part in pem.split("-----BEGIN CERTIFICATE-----")[1:])
    return {"".join(text.split()) for text in begun}


def tidy(state_dir: Path) -> None:
    """Remove what a write or an enrolment that was cut off left behind: it holds private keys that nobody needs.

    Only for an enrolled board, and only by the process that alone writes there.

    Raises:
        UnavailableError: ``disk.failed``.
    """
    folders = Folders(state_dir)
    with disk_errors(folders.identity):
        for path in (*folders.identity.glob(".*.tmp"), folders.tls_key):
            path.unlink(missing_ok=True)


def create_keys(state_dir: Path) -> tuple[SigningKey, bytes]:
    """Return the identity key and the TLS key (PKCS#8 PEM), made here unless an earlier, cut-off try left them.

    Raises:
        RefusedError: ``key.readable_by_others``.
        GarrisonError: ``identity.damaged``.
    """
    from garrison_agent.adapters.certificates import new_key

    folders = Folders(state_dir)
    folders.identity.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not folders.signing_key.exists():
        _put(folders.signing_key, SigningKey.generate().save)
    if not folders.tls_key.exists():
        _put(folders.tls_key, lambda path: write_private_file(path, new_key()))
    refuse_if_readable_by_others(folders.tls_key)
    try:
        return SigningKey.load(folders.signing_key), folders.tls_key.read_bytes()
    except ValueError as error:
        raise _damaged(folders.signing_key, error) from error


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
