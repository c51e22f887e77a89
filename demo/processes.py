"""Child processes of a local fleet: started as a user would, logged to a file, ended by pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class StepError(Exception):
    """A step failed: what happened, and the log that tells more."""

    def __init__(self, cause: str, log: Path | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.log = log


class Process:
    """One long-running program with its log."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._child is not None
        return self._child.pid

    def start(self) -> None:
        """Start the program; its output is appended to the log."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Tell whether the program still runs."""
        return self._child is not None and self._child.poll() is None

    def stop(self, timeout_s: float = 20) -> None:
        """Ask the program to end, and kill it if it does not."""
        if self._child is None or not self.running():
            return
        self._child.terminate()
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the program with SIGKILL; it gets no chance to save anything."""
        if self._child is not None and self.running():
            self._child.send_signal(signal.SIGKILL)
            self._child.wait(10)

    def require(self) -> None:
        """Raise if the program has ended by itself.

        Raises:
            StepError: It has.
        """
        if self._child is None or self._child.poll() is None:
            return
        raise StepError(f"{self.name} ended by itself with status {self._child.returncode}", self.log)


def free_port() -> int:
    """Return a loopback TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    """Tell whether something listens on a loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_for(
    what: str,
    condition: Callable[[], bool],
    *,
    timeout_s: float,
    log: Path | None = None,
    alive: Sequence[Process] = (),
) -> None:
    """Return once ``condition`` holds, looking five times a second while all of ``alive`` run.

    Raises:
        StepError: Time ran out, or one of ``alive`` ended.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        for process in alive:
            process.require()
        if time.monotonic() > deadline:
            raise StepError(f"after {timeout_s:.0f} s still waiting for: {what}", log)
        time.sleep(0.2)
