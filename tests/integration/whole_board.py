"""A board with everything that the local API can offer: an agent process, a text, an embedding, and a tensor model."""

from __future__ import annotations

import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.agent_process import AgentProcess

TEXT, EMBEDDINGS, FILES = "smollm2", "embeddings", "files"


class WholeBoard:
    """A running agent, at ``socket`` and at ``port`` of loopback, with three models in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self.process = AgentProcess(folder)
        self.process.config.write_text(
            f'state_dir = "{self.process.state}"\nruntime_dir = "{self.process.run}"\n'
            f'[api]\nhost = "127.0.0.1"\nport = {self.port}\n'
            "[runtime]\nthreads = 1\ncontext_length = 512\n"
        )

    @property
    def socket(self) -> Path:
        return self.process.run / "agent.sock"

    def _in_memory(self) -> bool:
        return {one["alias"] for one in self.process.status()["aliases"] if one["loaded"]} == {TEXT, EMBEDDINGS, FILES}

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[WholeBoard]:
        """Give a board once all its models serve; end it afterwards."""
        with tempfile.TemporaryDirectory(prefix="garrison-") as folder:  # short: it holds a socket
            board = cls(Path(folder))
            board.process.enrol(board.folder / "pki")
            board.process.install()
            board.process.install_text()
            board.process.install_embeddings()
            board.process.start()
            try:
                board.process.wait_for(board._in_memory)
                yield board
            finally:
                board.process.end(signal.SIGTERM, 30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
