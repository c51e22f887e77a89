from __future__ import annotations

from typing import Any

import pytest

from garrison_agent.runtimes.llama.settings import DEFAULT_SETTINGS, LlamaSettings, read_settings
from garrison_protocol.errors import InvalidError


def test_without_settings_the_defaults_hold_and_unknown_ones_are_for_others() -> None:
    assert read_settings({}) == DEFAULT_SETTINGS
    assert read_settings({"threads": 2, "something": "else"}) == DEFAULT_SETTINGS


def test_every_setting_is_read() -> None:
    settings: dict[str, str | int | bool] = {
        "flash_attention": True,
        "kv_cache_type": "q8_0",
        "batch_size": 64,
        "prefix_cache_mb": 0,
    }
    assert read_settings(settings) == LlamaSettings(True, "q8_0", 64, 0)
    assert read_settings({"flash_attention": "auto"}).flash_attention is None
    assert read_settings({"flash_attention": False}).flash_attention is False


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"flash_attention": "yes"}, "flash_attention"),
        ({"flash_attention": 1}, "flash_attention"),
        ({"kv_cache_type": "q4_0"}, "kv_cache_type"),
        ({"kv_cache_type": True}, "kv_cache_type"),
        ({"kv_cache_type": "q8_0", "flash_attention": False}, "flash_attention"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": "512"}, "batch_size"),
        ({"batch_size": 16}, "batch_size"),
        ({"prefix_cache_mb": -1}, "prefix_cache_mb"),
    ],
)
def test_a_wrong_one_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidError) as caught:
        read_settings(settings)
    assert caught.value.code == "model.load_failed"
    assert f"model_settings: {named} is" in caught.value.message
