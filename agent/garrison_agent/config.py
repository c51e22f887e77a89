"""What ``agent.toml`` says, checked, with a default for everything (docs/operations.md, "Agent configuration")."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_protocol.errors import InvalidError, NotFoundError

DEFAULT_PATH = Path("/etc/garrison/agent.toml")


class _Section(BaseModel):
    """Unknown keys are refused: a misspelt limit must not be a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiConfig(_Section):
    """The local API. The unix socket ``<runtime_dir>/agent.sock`` is always there; ``tcp`` adds loopback TCP."""

    host: str = "127.0.0.1"
    port: int = Field(default=5273, ge=0, le=65535)
    tcp: Literal["open", "off"] = "open"


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
    """Defaults of model workers; a manifest's ``model_settings`` win. ``threads`` 0: all cores but one."""

    threads: int = Field(default=0, ge=0, le=1024)
    context_length: int = Field(default=2048, ge=128)
    parallel: int = Field(default=4, ge=1, le=64)


class RegistryConfig(_Section):
    """Which way registry bytes come, and how often metadata is refreshed without a notice of change.

    ``source`` auto: over HTTP, and while that does not reach the controller, over MQTT.
    """

    source: Literal["auto", "http", "mqtt"] = "auto"
    refresh_s: float = Field(default=3600, ge=10)


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
