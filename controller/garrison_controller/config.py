"""The controller's configuration: TOML, checked once at start."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from garrison_protocol.errors import InvalidError, NotFoundError

DEFAULT_CONFIG_PATH = Path("/etc/garrison/controller.toml")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HttpConfig(_Section):
    """Where the controller listens for boards and operators."""

    host: str = "127.0.0.1"
    port: int = Field(default=8443, ge=1, le=65535)
    names: tuple[str, ...] = ()
    """Further DNS names and addresses for the server certificate."""


class DatabaseConfig(_Section):
    """``url`` empty: SQLite in the state folder. Otherwise an SQLAlchemy URL, such as ``postgresql+psycopg://``."""

    url: str = ""


class MqttConfig(_Section):
    """The broker: as the controller reaches it, and (``public_``) as boards do."""

    host: str = "127.0.0.1"
    port: int = Field(default=8883, ge=1, le=65535)
    public_host: str = ""
    public_port: int | None = Field(default=None, ge=1, le=65535)
    identity: str = Field(default="controller-1", pattern=r"^controller-[a-z0-9-]{1,50}$")
    protocol: Literal["5", "3.1.1"] = "5"
    keepalive_s: int = Field(default=60, ge=5, le=3600)


class RolloutsConfig(_Section):
    """Rollouts: how often they are advanced."""

    tick_s: float = Field(default=5, ge=0.1, le=3600)


class RegistryConfig(_Section):
    """Validity of the metadata that the controller signs."""

    timestamp_days: int = Field(default=7, ge=1, le=90)
    snapshot_days: int = Field(default=30, ge=1, le=365)


class DevicesConfig(_Section):
    """Validity of boards' certificates and enrolment tokens."""

    certificate_days: int = Field(default=30, ge=1, le=825)
    grace_days: int = Field(default=365, ge=0, le=3650)
    """How long after its end a certificate may still be renewed: a board may have been away."""
    token_hours: int = Field(default=24, ge=1, le=24 * 30)


class KeysConfig(_Section):
    """What opens the controller's private keys."""

    passphrase_file: Path | None = None
    """Its first line; none: the credential ``garrison-passphrase``, where systemd hands one over."""


class ControllerConfig(_Section):
    """The whole file."""

    state_dir: Path
    public_url: str = Field(pattern=r"^https://[^/ ]+$")
    """How boards and operators reach the controller: ``https://host:port``."""
    http: HttpConfig = HttpConfig()
    database: DatabaseConfig = DatabaseConfig()
    mqtt: MqttConfig = MqttConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    registry: RegistryConfig = RegistryConfig()
    devices: DevicesConfig = DevicesConfig()
    keys: KeysConfig = KeysConfig()

    @field_validator("public_url")
    @classmethod
    def _has_a_host(cls, value: str) -> str:
        if not urlsplit(value).hostname:
            raise ValueError("public_url names no host")
        return value

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database.url or f"sqlite:///{self.state_dir / 'controller.db'}"

    @property
    def public_host(self) -> str:
        """The host in ``public_url``."""
        return urlsplit(self.public_url).hostname or ""

    @property
    def board_mqtt(self) -> tuple[str, int]:
        """Host and port of the broker, as boards reach it."""
        return self.mqtt.public_host or self.mqtt.host, self.mqtt.public_port or self.mqtt.port

    @property
    def keys_dir(self) -> Path:
        """Online private keys."""
        return self.state_dir / "keys"

    @property
    def pki_dir(self) -> Path:
        """Certificate authorities and the controller's own certificates."""
        return self.state_dir / "pki"

    @property
    def metadata_dir(self) -> Path:
        """Published TUF metadata."""
        return self.state_dir / "metadata"

    @property
    def blobs_dir(self) -> Path:
        """Content-addressed files of published models: ``sha256/<first two digits>/<digest>``."""
        return self.state_dir / "blobs"


def load_config(path: Path | None) -> ControllerConfig:
    """Return the configuration in ``path``, or in ``/etc/garrison/controller.toml``.

    A relative ``state_dir`` or ``keys.passphrase_file`` is taken from the folder of the file.

    Raises:
        NotFoundError: ``config.missing``.
        InvalidError: ``config.malformed``.
    """
    source = path or DEFAULT_CONFIG_PATH
    try:
        document = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(
            "config.missing",
            f"cannot read {source}: {error.strerror}",
            hint="name the controller's configuration with --config",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidError("config.malformed", f"{source} is no TOML: {error}", hint="correct that line") from error
    try:
        config = ControllerConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidError(
            "config.malformed", f"{source}: {place}: {first['msg']}", hint=f"correct {place} in {source}"
        ) from error
    folder = source.resolve().parent  # joining an absolute path to it gives that path
    passphrase = config.keys.passphrase_file
    keys = KeysConfig(passphrase_file=None if passphrase is None else folder / passphrase)
    return config.model_copy(update={"state_dir": folder / config.state_dir, "keys": keys})
