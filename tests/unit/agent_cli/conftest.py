from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from garrison_agent.api.commands import Command
from garrison_agent.api.server import LocalApi
from tests.fakes.local_owner import LocalOwner

Serve: TypeAlias = Callable[[Callable[[Command], object]], LocalOwner]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose folders exist and are empty."""
    for folder in ("state", "run"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "agent.toml"
    path.write_text(f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n')
    return path


@pytest.fixture
def serve(config: Path) -> Iterator[Serve]:
    """Start the API of an agent that answers commands as told."""
    running: list[LocalApi] = []

    def start(answer: Callable[[Command], object]) -> LocalOwner:
        owner = LocalOwner(answer=answer)
        socket = config.parent / "run" / "agent.sock"
        api = LocalApi(host="", port=0, tcp_open=False, socket=socket, table=owner.read, command=owner.post)
        api.start()
        running.append(api)
        return owner

    yield start
    for api in running:
        api.stop()
