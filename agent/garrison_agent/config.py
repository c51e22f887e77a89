"""What ``agent.toml`` says, checked, with a default for everything (docs/operations.md, "Agent configuration")."""

from __future__ import annotations

import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from garrison_protocol.errors import InvalidError, NotFoundError

DEFAULT_PATH = Path("/etc/garrison/agent.toml")


class _Section(BaseModel):
    """Unknown keys are refused: a misspelt limit must not be a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiConfig(_Section):
    """The local API. The unix socket ``<runtime_dir>/agent.sock`` is always there; ``tcp`` adds TCP.

    Beyond loopback TCP needs keys and TLS. ``names`` are what clients may call the board there.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=5273, ge=0, le=65535)
    tcp: Literal["open", "keys", "off"] = "open"
    names: tuple[str, ...] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    request_timeout_s: float | None = Field(default=None, gt=0, le=86_400)

    @property
    def tls(self) -> tuple[Path, Path] | None:
        """Certificate chain and key, if TCP speaks TLS."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return self.tls_certificate, self.tls_key

    @model_validator(mode="after")
    def _refuse_exposure(self) -> ApiConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("api.tls_certificate and api.tls_key belong together")
        if self.tcp == "off" or _is_loopback(self.host):
            return self
        lacking = [] if self.tcp == "keys" else ['api.tcp = "keys"']
        if self.tls is None:
            lacking.append("api.tls_certificate and api.tls_key")
        if lacking:
            raise ValueError(f"api.host {self.host!r} is reachable by other machines; that needs {', '.join(lacking)}")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class MqttConfig(_Section):
    """How to reach the broker. ``host`` and ``port`` override what the enrolment said."""

    protocol: Literal["5", "3.1.1"] = "5"
    host: str | None = None
    port: int | None = Field(default=None, ge=1, le=65535)
    keepalive_s: int = Field(default=60, ge=5, le=3600)
    reconnect_max_s: float = Field(default=120, ge=1, le=3600)


class TelemetryConfig(_Section):
    """How often a sample is recorded and a status is published while nothing changes."""

    interval_s: float = Field(default=60, ge=1)
    heartbeat_s: float = Field(default=60, ge=1)


class LimitsConfig(_Section):
    """What the agent may use. ``memory_budget_mb`` 0: 80 % of the board's memory."""

    disk_reserve_mb: int = Field(default=256, ge=0)
    memory_budget_mb: int = Field(default=0, ge=0)
    telemetry_rows: int = Field(default=100_000, ge=1000)


class RuntimeConfig(_Section):
    """Defaults of model workers; a manifest's ``model_settings`` win. ``threads`` 0: all cores but one.

    ``keep_alive_s``: how long a model stays in memory after its last use; negative: for ever, unless another one that
    is asked for needs the room. ``pinned`` names aliases that never leave by themselves. A worker that has requests and
    does not get on for ``stall_timeout_s`` is ended and started again. ``memory_limit`` "auto" ends a worker that takes
    far more than was measured; ``cpu_limit_percent`` is of one core, 0: no limit.
    """

    threads: int = Field(default=0, ge=0, le=1024)
    context_length: int = Field(default=2048, ge=128)
    parallel: int = Field(default=4, ge=1, le=64)
    keep_alive_s: float = Field(default=-1, allow_inf_nan=False)
    pinned: tuple[str, ...] = Field(default=(), max_length=64)
    stall_timeout_s: float = Field(default=120, ge=5, le=3600, allow_inf_nan=False)
    memory_limit: Literal["auto", "off"] = "auto"
    cpu_limit_percent: int = Field(default=0, ge=0, le=102_400)


class RegistryConfig(_Section):
    """Which way registry bytes come, and how often metadata is refreshed without a notice of change.

    ``source`` auto: over HTTP, and while that does not reach the controller, over MQTT.
    """

    source: Literal["auto", "http", "mqtt"] = "auto"
    refresh_s: float = Field(default=3600, ge=10)


class UpstreamConfig(_Section):
    """An OpenAI-compatible server that runs already, offered under ``alias`` (docs/operations.md, "Upstreams").

    ``url`` is its base, as OpenAI's clients take it (``http://127.0.0.1:8000/v1``); ``model`` is its own name for it.
    """

    alias: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    url: str = Field(max_length=500)
    model: str = Field(min_length=1, max_length=200)
    protocol: Literal["openai"] = "openai"
    api_key_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: float = Field(default=300, ge=1, le=86_400)
    stream_usage: bool = True

    @model_validator(mode="after")
    def _check_url(self) -> UpstreamConfig:
        parts = urlsplit(self.url)  # a ValueError of its own is one of this check
        port = parts.port
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not self.url.isascii():
            raise ValueError("url is no http or https URL of a server")
        if parts.username or parts.password or parts.query or parts.fragment or set(self.url) & set(" \r\n\t"):
            raise ValueError("url has more than scheme, host, port, and path; a key goes into api_key_file")
        if self.api_key_file is not None and parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise ValueError("api_key_file: over http the key could be read on its way; use https")
        return self


class AgentConfig(_Section):
    """The whole file."""

    state_dir: Path = Path("/var/lib/garrison")
    runtime_dir: Path = Path("/run/garrison")
    api: ApiConfig = ApiConfig()
    mqtt: MqttConfig = MqttConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    limits: LimitsConfig = LimitsConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    registry: RegistryConfig = RegistryConfig()
    upstream: tuple[UpstreamConfig, ...] = Field(default=(), max_length=32)

    @model_validator(mode="after")
    def _refuse_two_of_one_alias(self) -> AgentConfig:
        aliases = [one.alias for one in self.upstream]
        if len(set(aliases)) != len(aliases):
            raise ValueError("upstream: two have one alias")
        return self

    @property
    def database_path(self) -> Path:
        """The one SQLite file that holds the agent's state."""
        return self.state_dir / "agent.db"

    @property
    def socket_path(self) -> Path:
        """The unix socket of the local API."""
        return self.runtime_dir / "agent.sock"


def load_config(path: Path | None) -> AgentConfig:
    """Return the configuration in ``path``; None: ``DEFAULT_PATH`` if it exists, else all defaults.

    Raises:
        NotFoundError: ``config.not_found``; a file that was asked for does not exist.
        InvalidError: ``config.invalid``; no TOML, an unknown key, or a value out of range.
    """
    if path is None and not DEFAULT_PATH.exists():
        return AgentConfig()
    file = path or DEFAULT_PATH
    try:
        return AgentConfig.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise NotFoundError(
            "config.not_found", f"there is no {file}", hint="give the right path with --config"
        ) from error
    except OSError as error:
        raise InvalidError(
            "config.invalid", f"{file} cannot be read: {error.strerror}", hint="check the file's owner and mode"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidError("config.invalid", f"{file} is no TOML: {error}", hint="correct the file") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidError(
            "config.invalid", f"{file}: {where}: {first['msg']}", hint=f"correct {where}, or remove it for the default"
        ) from error
