"""Every example of docs/local-api.md, run in page order against an agent with real models."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.integration.curl import run_curl
from tests.integration.examples import PAGE, Example, check_answer, read_examples
from tests.integration.whole_board import WholeBoard

pytestmark = pytest.mark.integration

EXAMPLES = list(read_examples(PAGE.read_text(encoding="utf-8")))
URL, SOCKET = "http://127.0.0.1:5273/", "/run/garrison/agent.sock"


@dataclass
class Reader:
    """Somebody who types the page's examples, one after the other, and keeps what came for ``$NAME``."""

    board: WholeBoard
    folder: Path
    names: dict[str, str] = field(default_factory=dict)

    def type(self, example: Example) -> None:
        for line in example.makes:
            subprocess.run(["sh", "-c", line], cwd=self.folder, check=True, timeout=60)
        command = example.parse(self.names)
        if command.socket is None:
            assert command.url.startswith(URL)
            command = replace(command, url=command.url.replace(URL, f"http://127.0.0.1:{self.board.port}/"))
        else:
            assert command.socket == SOCKET
            command = replace(command, socket=str(self.board.socket))
        answer = run_curl(command, self.folder)
        check_answer(example, answer)
        if answer.headers.get("content-type") == "application/json":
            value = json.loads(answer.body)
            if isinstance(value, dict):
                self.names |= {name: one for name, one in value.items() if isinstance(one, str)}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with WholeBoard.running() as board:
        yield Reader(board, tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line-{example.line}")
def test_example(reader: Reader, example: Example) -> None:
    reader.type(example)
