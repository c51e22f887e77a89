from __future__ import annotations

from pathlib import Path

import pytest

from garrison_controller.config import load_config
from garrison_protocol.errors import InvalidError, NotFoundError

MINIMAL = 'state_dir = "state"\npublic_url = "https://fleet.example:8443"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "controller.toml"
    path.write_text(text)
    return path


def test_a_minimal_file_is_enough(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.state_dir == tmp_path / "state"
    assert config.public_host == "fleet.example"
    assert config.database_url == f"sqlite:///{tmp_path}/state/controller.db"
    assert config.board_mqtt == ("127.0.0.1", 8883)
    assert config.mqtt.identity == "controller-1"


def test_boards_may_reach_the_broker_elsewhere(tmp_path: Path) -> None:
    text = MINIMAL + '[mqtt]\nhost = "10.0.0.1"\npublic_host = "mqtt.example"\npublic_port = 443\n'
    assert load_config(write(tmp_path, text)).board_mqtt == ("mqtt.example", 443)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("state_dir = ", "TOML"),
        (MINIMAL + "stat_dir = 1\n", "stat_dir"),
        (MINIMAL + "[http]\nport = 0\n", r"http\.port"),
        (MINIMAL + '[mqtt]\nidentity = "edge-1"\n', r"mqtt\.identity"),
        ('state_dir = "x"\npublic_url = "http://plain"\n', "public_url"),
        ('state_dir = "x"\npublic_url = "https://:1"\n', "public_url"),
        ('public_url = "https://x"\n', "state_dir"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(InvalidError, match=rf"config\.malformed.*{place}"):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.missing.*nothing\.toml"):
        load_config(tmp_path / "nothing.toml")
