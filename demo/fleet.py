"""A whole fleet on one machine: broker, controller, and boards as separate processes, state in one folder.

The demo, the end-to-end tests, and the installation test drive it; all of them through the same commands that an
operator would type.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.evidence import Comparison, Heads, acknowledged, compare, heads
from demo.processes import Process, StepError, free_port, is_open, wait_for

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PASSPHRASE = "correct horse battery staple"
ROOT_SIGNERS = ("rita", "ravi", "rosa")
TARGETS_SIGNERS = ("tara", "theo")
DEFAULT_MQTT_PROTOCOL = "5"
MAX_FOLDER_LENGTH = 60


def find_mosquitto() -> tuple[str, dict[str, str]]:
    """Return the broker's program and what its environment needs besides ours.

    Looks at ``GARRISON_MOSQUITTO``, PATH, and where ``make setup`` unpacks Debian's package.

    Raises:
        StepError: There is none; ``make setup`` unpacks one.
    """
    searched = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    installed = os.environ.get("GARRISON_MOSQUITTO") or shutil.which("mosquitto", path=searched)
    if installed:
        return installed, {}
    unpacked = ROOT / ".broker"
    program = unpacked / "usr/sbin/mosquitto"
    if program.exists():
        libraries = next((unpacked / "usr/lib").glob("*-linux-gnu*"))
        return str(program), {"LD_LIBRARY_PATH": str(libraries)}
    raise StepError("Mosquitto is missing: run `make setup`, or `sudo apt-get install mosquitto`")


class Board:
    """One board: its folder, its agent process, and the agent's own command line."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
        self.folder = fleet.folder / "boards" / name
        self.state = self.folder / "state"
        self.runtime = fleet.runtime / name
        self.config = self.folder / "agent.toml"
        self.port = free_port()
        self.log = fleet.logs / f"agent-{name}.log"
        self.agent = Process(
            f"agent {name}", [str(BIN / "garrison-agent"), "run", "--config", str(self.config)], self.log
        )
        self._fleet = fleet

    @property
    def url(self) -> str:
        """The board's local API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def socket(self) -> Path:
        """The board's management socket."""
        return self.runtime / "agent.sock"

    @property
    def database(self) -> Path:
        """The board's own store."""
        return self.state / "agent.db"

    def configure(self, *, threads: int = 1) -> None:
        """Write the board's configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'state_dir = "{self.state}"\nruntime_dir = "{self.runtime}"\n'
            f'[api]\nhost = "127.0.0.1"\nport = {self.port}\n'
            f'[mqtt]\nprotocol = "{self._fleet.mqtt_protocol}"\nreconnect_max_s = 3\n'
            "[telemetry]\ninterval_s = 2\nheartbeat_s = 5\n"
            f"[runtime]\nthreads = {threads}\n"
            "[limits]\ndisk_reserve_mb = 64\n"
        )

    def run(self, *words: str) -> dict[str, Any]:
        """Run a ``garrison-agent`` command on the board and return its JSON.

        Raises:
            StepError: It failed.
        """
        done = self.try_run(*words, "-o", "json")
        if done.returncode != 0:
            raise StepError(f"garrison-agent {' '.join(words)}: {done.stderr.strip()[-600:]}", self.log)
        return (
            dict(json.loads(done.stdout)) if done.stdout.strip().startswith("{") else {"items": json.loads(done.stdout)}
        )

    def try_run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a ``garrison-agent`` command on the board, whatever comes of it."""
        return subprocess.run(
            [str(BIN / "garrison-agent"), *words, "--config", str(self.config)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def enrol(self, enrolment: str) -> None:
        """Enrol the board; it makes its keys itself.

        Raises:
            StepError: The controller or the board refused.
        """
        done = self.try_run("enroll", enrolment)
        if done.returncode != 0:
            raise StepError(f"garrison-agent enroll: {done.stderr.strip()[-600:]}", self._fleet.controller.log)

    def start(self) -> None:
        """Start the agent and return once its local API answers."""
        self.agent.start()
        wait_for(f"{self.name}'s local API", self.answers, timeout_s=30, log=self.log, alive=[self.agent])

    def answers(self) -> bool:
        """Tell whether the agent answers on its management socket."""
        return self.try_run("status", "-o", "json").returncode == 0

    def status(self) -> dict[str, Any]:
        """Return what ``garrison-agent status`` says."""
        return self.run("status")

    def alias(self, alias: str) -> dict[str, Any]:
        """Return the status of one alias, empty if the board has none of that name."""
        return next((one for one in self.status()["aliases"] if one["alias"] == alias), {})

    def pending(self) -> int:
        """Return how many rows wait for a receipt."""
        return sum(stream["pending"] for stream in self.status()["outbox"].values())


class Fleet:
    """Everything that runs, and the operator's command line."""

    def __init__(self, folder: Path, boards: Sequence[str], *, mqtt_protocol: str = DEFAULT_MQTT_PROTOCOL) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.mqtt_protocol = mqtt_protocol
        # A socket's path holds 107 bytes: below a deep folder the boards' sockets go elsewhere.
        deep = len(str(folder)) > MAX_FOLDER_LENGTH
        self.runtime = Path(tempfile.mkdtemp(prefix="garrison-")) if deep else folder / "run"
        self.workspace = folder / "signers" / "workspace"
        self.keys = folder / "signers" / "keys"
        self.state = folder / "controller"
        self.config = folder / "controller.toml"
        self.passphrase = folder / "controller.passphrase"
        self.http_port, self.mqtt_port = free_port(), free_port()
        self.tokens: dict[str, str] = {}
        mosquitto, environment = find_mosquitto()
        self.broker = Process(
            "mosquitto",
            [mosquitto, "-c", str(folder / "broker" / "mosquitto.conf")],
            self.logs / "broker.log",
            environment,
        )
        self.controller = Process(
            "controller",
            [str(BIN / "garrison"), "serve", "run", "--config", str(self.config)],
            self.logs / "controller.log",
        )
        self.boards = [Board(self, name) for name in boards]

    @property
    def url(self) -> str:
        """The controller's address."""
        return f"https://127.0.0.1:{self.http_port}"

    @property
    def server_ca(self) -> Path:
        """The certificate that operators' clients trust."""
        return self.state / "pki" / "server-ca.pem"

    @property
    def database(self) -> Path:
        """The controller's store."""
        return self.state / "controller.db"

    def try_garrison(self, *words: str, who: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a ``garrison`` command as the principal ``who``, whatever comes of it."""
        environment = {
            **os.environ,
            "GARRISON_URL": self.url,
            "GARRISON_CA": str(self.server_ca),
            "GARRISON_TOKEN": self.tokens.get(who or "", ""),
            "GARRISON_KEY_PASSPHRASE": PASSPHRASE,
        }
        return subprocess.run(
            [str(BIN / "garrison"), *words],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )

    def garrison(self, *words: str, who: str | None = None) -> str:
        """Run a ``garrison`` command and return its output.

        Raises:
            StepError: It failed.
        """
        done = self.try_garrison(*words, who=who)
        if done.returncode != 0:
            raise StepError(
                f"garrison {' '.join(words)} (status {done.returncode}): {done.stderr.strip()[-800:]}",
                self.controller.log,
            )
        return done.stdout

    def json(self, *words: str, who: str | None = None) -> Any:
        """Run a ``garrison`` command and return its JSON."""
        return json.loads(self.garrison(*words, "-o", "json", who=who))

    def initialise(self) -> None:
        """Create the controller's state and the broker's configuration."""
        self.config.write_text(
            f'state_dir = "{self.state}"\npublic_url = "{self.url}"\n'
            f'[http]\nhost = "127.0.0.1"\nport = {self.http_port}\n'
            f'[mqtt]\nhost = "127.0.0.1"\nport = {self.mqtt_port}\n'
            f'public_host = "127.0.0.1"\npublic_port = {self.mqtt_port}\nprotocol = "{self.mqtt_protocol}"\n'
            f'[rollouts]\ntick_s = 0.5\n[keys]\npassphrase_file = "{self.passphrase}"\n'
        )
        self.passphrase.touch(mode=0o600)
        self.passphrase.write_text(f"{secrets.token_urlsafe(32)}\n")
        self.garrison("serve", "init", "--config", str(self.config))
        # Started by root, Mosquitto would become user "mosquitto", who may not read keys in this folder.
        user = ("--user", "root") if os.geteuid() == 0 else ()
        out = str(self.folder / "broker")
        self.garrison("broker", "config", "mosquitto", "--config", str(self.config), "--out", out, *user)

    def start_broker(self) -> None:
        """Start Mosquitto and return once it listens."""
        self.broker.start()
        wait_for("the broker", lambda: is_open(self.mqtt_port), timeout_s=15, log=self.broker.log, alive=[self.broker])

    def start_controller(self) -> None:
        """Start the controller and return once it listens."""
        self.controller.start()
        wait_for(
            "the controller",
            lambda: is_open(self.http_port),
            timeout_s=60,
            log=self.controller.log,
            alive=[self.controller],
        )

    def create_principals(self, roles: Mapping[str, Sequence[str]]) -> None:
        """Create the first security-admin on the console, and through it everybody else, for the whole fleet."""
        self.tokens["sven"] = self.json("access", "bootstrap", "sven", "--config", str(self.config))["token"]
        for name, granted in roles.items():
            self.garrison("access", "principal", "create", name, who="sven")
            for role in granted:
                self.garrison("access", "grant", name, role, "--scope", "/", who="sven")
            self.tokens[name] = self.json("access", "token", "create", name, who="sven")["token"]

    def create_registry(self) -> None:
        """Hold the key ceremony: root 2 of 3, targets 2 of 2, online roles with the controller."""
        self.keys.mkdir(parents=True, exist_ok=True)
        for name in (*ROOT_SIGNERS, *TARGETS_SIGNERS):
            self.garrison("registry", "key", "generate", name, "--out", str(self.keys))
        words = ["registry", "init", "--workspace", str(self.workspace), "--fleet", "demo"]
        words += ["--online", str(self.state / "online.json")]
        for name in ROOT_SIGNERS:
            words += ["--root-key", str(self.keys / f"{name}.pub.json")]
        for name in TARGETS_SIGNERS:
            words += ["--targets-key", str(self.keys / f"{name}.pub.json")]
        self.garrison(*words, "--root-threshold", "2", "--targets-threshold", "2")
        for name in (*ROOT_SIGNERS[:2], *TARGETS_SIGNERS):
            self.sign(name)

    def sign(self, name: str) -> None:
        """Have one signer sign whatever waits for them."""
        key = str(self.keys / f"{name}.key")
        self.garrison("registry", "sign", "--workspace", str(self.workspace), "--key", key, "--yes")

    def push_registry(self, who: str) -> None:
        """Publish the signed metadata."""
        self.garrison("registry", "push", "--workspace", str(self.workspace), who=who)

    def publish(self, package: Path, who: str, signers: Sequence[str] = TARGETS_SIGNERS) -> None:
        """Add a package to the registry, have it signed, and publish it."""
        self.garrison("model", "add", str(package), "--workspace", str(self.workspace))
        for name in signers:
            self.sign(name)
        self.garrison("model", "publish", str(package), "--workspace", str(self.workspace), who=who)

    def bring_up(self, roles: Mapping[str, Sequence[str]], publisher: str) -> None:
        """Start broker and controller, make the principals, and hold the key ceremony."""
        self.initialise()
        self.start_broker()
        self.start_controller()
        self.create_principals(roles)
        self.create_registry()
        self.push_registry(who=publisher)

    def delivered(self, board: Board, upto: Heads | None = None, *, timeout_s: float = 90) -> list[Comparison]:
        """Wait for the receipts of all that ``board`` had recorded (``upto``, else until now), and compare it.

        Raises:
            StepError: A row never got its receipt.
        """
        marks = heads(board.database) if upto is None else upto
        wait_for(
            f"{board.name}'s receipts up to {marks}",
            lambda: acknowledged(board.database, marks),
            timeout_s=timeout_s,
            log=self.controller.log,
        )
        return compare(board.name, board.database, self.database, marks)

    def stop(self) -> None:
        """End every process."""
        for board in self.boards:
            board.agent.stop()
        self.controller.stop()
        self.broker.stop()
        shutil.rmtree(self.runtime, ignore_errors=True)
