"""A controller behind real TLS in this process, for tests of its API."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvicorn

from garrison_controller.access import service as access
from garrison_controller.api.app import create_app
from garrison_controller.cli.client import ApiClient, Login
from garrison_controller.config import ControllerConfig, HttpConfig, KeysConfig, MqttConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import pki
from garrison_controller.devices.keyring import find_passphrase
from garrison_controller.wiring import Controller

DEADLINE_S = 20.0


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s} s for {what}")
        time.sleep(0.01)


class Served:
    """A running controller and clients of it."""

    def __init__(self, controller: Controller, url: str) -> None:
        self.controller = controller
        self.url = url
        self.ca = controller.config.pki_dir / "server-ca.pem"
        with controller.database.session() as session:
            self.admin_token = access.bootstrap(session, "alice", datetime.now(UTC)).secret
        self.admin = self.client(self.admin_token)

    def client(self, token: str) -> ApiClient:
        return ApiClient(Login(self.url, token, self.ca))

    def principal(self, name: str, *roles: str, scope: str = "/") -> ApiClient:
        """Return a client of a new principal that has ``roles`` in ``scope``."""
        self.admin.post("/api/v1/access/principals", {"name": name})
        for role in roles:
            self.admin.post("/api/v1/access/grants", {"principal": name, "role": role, "scope": scope})
        return self.client(self.admin.post("/api/v1/access/tokens", {"principal": name})["token"])

    def board_http(self, bearer: str = "") -> httpx.Client:
        """Return what a board calls with: TLS under the pinned authority, perhaps a session."""
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        context = ssl.create_default_context(cafile=str(self.ca))
        return httpx.Client(base_url=self.url, verify=context, headers=headers, trust_env=False)


@contextmanager
def served_controller(folder: Path) -> Iterator[Served]:
    """Run a controller's API, its keys encrypted; bus and jobs stay off. A root is published that nobody signed."""
    passphrase = folder / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text("correct horse battery staple\n")
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    config = ControllerConfig(
        state_dir=folder / "state",
        public_url=f"https://127.0.0.1:{port}",
        http=HttpConfig(port=port),
        mqtt=MqttConfig(public_host="broker.example", public_port=8883),
        keys=KeysConfig(passphrase_file=passphrase),
    )
    pki.initialise(config, datetime.now(UTC), find_passphrase(config))
    (config.metadata_dir / "1.root.json").write_bytes(b"a root, as far as enrolment is concerned")
    database = Database(config.database_url)
    database.create_all()
    database.close()
    controller = Controller(config)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(controller),
            ssl_certfile=str(config.pki_dir / "server.pem"),
            ssl_keyfile=str(config.pki_dir / "server.key"),
            log_config=None,
            lifespan="off",
        )
    )
    thread = threading.Thread(target=server.run, args=([listening],), name="controller-api")
    thread.start()
    served = Served(controller, config.public_url)
    try:
        wait_until(lambda: server.started, "the server")
        yield served
    finally:
        served.admin.close()
        server.should_exit = True
        thread.join(DEADLINE_S)
        listening.close()
        controller.stop()


def environment(url: str, token: str, ca: Path, home: Path) -> dict[str, str]:
    """Return the environment of a command that calls the controller."""
    return {
        **os.environ,
        "GARRISON_URL": url,
        "GARRISON_TOKEN": token,
        "GARRISON_CA": str(ca),
        "XDG_CONFIG_HOME": str(home),
    }
