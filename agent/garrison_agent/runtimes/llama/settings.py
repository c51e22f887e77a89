"""What a manifest's ``model_settings`` may say about llama.cpp. Pure; what it does not know is for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from garrison_agent.runtimes.spec import Settings
from garrison_protocol.errors import InvalidError

CacheType = Literal["f16", "q8_0"]

_MIB = 1 << 20


@dataclass(frozen=True)
class LlamaSettings:
    """How a GGUF model is run. ``flash_attention`` None: llama.cpp decides."""

    flash_attention: bool | None = None
    kv_cache_type: CacheType = "f16"
    batch_size: int = 512
    """Tokens per decode call, at most."""
    prefix_cache_bytes: int = 64 * _MIB
    """For conversations that had to leave the model's own memory."""


DEFAULT_SETTINGS = LlamaSettings()


def read_settings(settings: Settings) -> LlamaSettings:
    """Return the settings in a manifest's ``model_settings``.

    Raises:
        InvalidError: ``model.load_failed``: one of them has the wrong type or is out of range.
    """
    default = DEFAULT_SETTINGS
    flash = settings.get("flash_attention", "auto")
    if flash != "auto" and not isinstance(flash, bool):
        raise _wrong("flash_attention", flash, 'true, false, or "auto"')
    cache = settings.get("kv_cache_type", default.kv_cache_type)
    if cache not in get_args(CacheType):
        raise _wrong("kv_cache_type", cache, " or ".join(f'"{name}"' for name in get_args(CacheType)))
    if cache != "f16" and flash is False:
        raise _wrong("flash_attention", flash, f"true or absent with kv_cache_type {cache}")
    return LlamaSettings(
        flash_attention=None if flash == "auto" else bool(flash),
        kv_cache_type="q8_0" if cache == "q8_0" else "f16",
        batch_size=_number(settings, "batch_size", default.batch_size, least=32, most=8192),
        prefix_cache_bytes=_number(settings, "prefix_cache_mb", default.prefix_cache_bytes // _MIB, least=0, most=65536)
        * _MIB,
    )


def _number(settings: Settings, name: str, default: int, *, least: int, most: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _wrong(name, value, f"a whole number from {least} to {most}")
    return value


def _wrong(name: str, value: object, instead: str) -> InvalidError:
    return InvalidError(
        "model.load_failed",
        f"model_settings: {name} is {value!r}; it must be {instead}",
        hint="publish a version of the package with correct model_settings",
    )
