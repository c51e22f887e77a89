"""A real Mosquitto on loopback for tests: found where it is installed or unpacked, stopped by its own process id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from demo.fleet import find_mosquitto
from demo.processes import free_port
from tests.fakes.pki import FleetPki

START_TIMEOUT_S = 15.0

ACL = """\
pattern write garrison/v1/up/%u/#
pattern read garrison/v1/down/%u/#
pattern read garrison/v1/registry/#
user controller-1
topic readwrite garrison/v1/#
"""


def tls_config(pki: FleetPki, folder: Path, *, acl: str = ACL) -> str:
    """Return a configuration with client certificates, per-device topics, and persistence in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = folder / "acl"
    rules.write_text(acl)
    rules.chmod(0o600)
    return f"""\
cafile {pki.device_ca.pem}
certfile {pki.server.cert}
keyfile {pki.server.key}
crlfile {pki.device_ca.crl}
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {rules}
persistence true
persistence_location {folder}/
max_packet_size 1048576
"""


class MosquittoBroker:
    """One broker process; every start uses the same ``port``, so clients can find it again.

    ``config`` is text, to which the listener on ``port`` is added, or the path of a whole configuration file,
    whose own listener must be on ``port``.
    """

    def __init__(self, folder: Path, config: str | Path, *, port: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.log = folder / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None
        if isinstance(config, Path):
            self._config = config
            return
        # Started by root, Mosquitto becomes another user, who could not read a test's private files.
        user = "user root\n" if os.geteuid() == 0 else ""
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"{user}listener {self.port} 127.0.0.1\n{config}")

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the broker and return when it accepts connections.

        Raises:
            RuntimeError: It ended or did not listen in time; the message holds its log.
        """
        binary, environment = find_mosquitto()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [binary, "-c", str(self._config)], stdout=log, stderr=log, env={**os.environ, **environment}
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        self.kill()
        raise RuntimeError(f"mosquitto did not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """End the broker in order (it writes its persistence file)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the broker as a power cut would."""
        self._end(signal.SIGKILL)

    def reload(self) -> None:
        """Make the running broker read its CRL and topic rules again."""
        self._signal(signal.SIGHUP)

    def pause(self) -> None:
        """Freeze the broker: the kernel still accepts connections and bytes, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen broker go on."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> MosquittoBroker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal(self, which: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(which)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.send_signal(signal.SIGCONT)  # a frozen process would not hear it
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)
        self._process = None
