from __future__ import annotations

from pathlib import Path

import pytest

from garrison_agent.config import AgentConfig, load_config
from garrison_protocol.errors import InvalidError

GOOD = {"alias": "big", "url": "http://127.0.0.1:8000/v1", "model": "theirs"}


def load(folder: Path, *upstreams: dict[str, str]) -> AgentConfig:
    path = folder / "agent.toml"
    tables = ("\n".join(["[[upstream]]", *(f'{key} = "{value}"' for key, value in one.items())]) for one in upstreams)
    path.write_text("\n".join(tables))
    return load_config(path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"url": "https://gpu.example/v1", "api_key_file": "/k"},
        {"url": "http://localhost:11434/v1", "api_key_file": "/k"},
        {"url": "http://[::1]:8000/v1", "api_key_file": "/k"},
        {"url": "http://gpu.example:8000/llm/v1"},
    ],
)
def test_servers_that_may_be_offered(tmp_path: Path, changes: dict[str, str]) -> None:
    (one,) = load(tmp_path, {**GOOD, **changes}).upstream
    assert one.timeout_s == 300


@pytest.mark.parametrize(
    "changes",
    [
        {"alias": "Big"},
        {"alias": "big/model"},
        {"alias": ""},
        {"model": ""},
        {"protocol": "ollama"},
        {"url": "ftp://gpu.example/v1"},
        {"url": "gpu.example:8000/v1"},
        {"url": "http:///v1"},
        {"url": "http://gpu.example:0/v1"},
        {"url": "http://gpu.example:99999/v1"},
        {"url": "http://user:secret@gpu.example/v1"},
        {"url": "http://gpu.example/v1?key=1"},
        {"url": "http://gpu.example/v1#a"},
        {"url": "http://gpu.example/v 1"},
        {"url": "http://gpu.example/v1\\r\\nx: y"},
        {"url": "http://gpu.example/v1", "api_key_file": "/k"},
        {"verify": "false"},
    ],
)
def test_servers_that_may_not(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(InvalidError) as refused:
        load(tmp_path, {**GOOD, **changes})
    assert refused.value.code == "config.invalid"
    assert "secret" not in refused.value.message


def test_two_of_one_alias_are_refused(tmp_path: Path) -> None:
    assert len(load(tmp_path, GOOD, {**GOOD, "alias": "other"}).upstream) == 2
    with pytest.raises(InvalidError, match="one alias"):
        load(tmp_path, GOOD, GOOD)
