"""``garrison serve``: create, run and look at the controller itself, on its own host."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn

from garrison_controller.api.app import create_app
from garrison_controller.cli.client import ApiClient, Login
from garrison_controller.cli.output import Output, OutputFormat, OutputOption
from garrison_controller.config import load_config
from garrison_controller.db.base import Database
from garrison_controller.db.migrations import upgrade
from garrison_controller.devices import broker, pki
from garrison_controller.jobs import certificates
from garrison_controller.systemd import notify
from garrison_controller.wiring import Controller
from garrison_protocol.errors import UnavailableError

app = typer.Typer(help="The controller itself: create, run, look at it.", no_args_is_help=True)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML; /etc/garrison/controller.toml by default.")]
GRACE_S = 5
KEEP_ALIVE_S = 30
BACKLOG = 1024


@app.command("init", epilog="Example: garrison serve init --config controller.toml")
def init(config: ConfigOption = None, output: OutputOption = OutputFormat.TABLE) -> None:
    """Create keys, authorities and the database; write online.json for the signing ceremony."""
    settings = load_config(config)
    online = pki.initialise(settings, datetime.now(UTC))
    upgrade(settings.database_url)
    Output(output).done(
        f"Created {settings.state_dir}. Next: garrison access bootstrap NAME; "
        f"then `garrison registry init --online {online}`.",
        {"state_dir": str(settings.state_dir), "online": str(online)},
    )


@app.command("run", epilog="Example: garrison serve run --config controller.toml")
def run(
    config: ConfigOption = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Run the controller until SIGTERM or Ctrl-C; the schema is brought up to date first."""
    settings = load_config(config)
    pki.check_initialised(settings)
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("tuf").setLevel(logging.WARNING)
    upgrade(settings.database_url)
    with _listen(settings.http.host, settings.http.port) as listening:
        controller = Controller(settings)
        # At its end uvicorn raises the signal that stopped it once more; that must not kill us before the clean-up.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _ignore)
        controller.start()
        try:
            _Server(_uvicorn(controller, log_level)).run([listening])
        finally:
            notify("STOPPING=1")
            controller.stop()


@app.command("status", epilog="Example: garrison serve status --config controller.toml")
def status(config: ConfigOption = None, output: OutputOption = OutputFormat.TABLE) -> None:
    """Tell whether the controller of this configuration answers, and which certificates end soon."""
    settings = load_config(config)
    pki.check_initialised(settings)
    with ApiClient(Login(settings.public_url, "", settings.pki_dir / f"{pki.SERVER_CA}.pem")) as client:
        health = client.get("/healthz")
    database = Database(settings.database_url)
    try:
        notices = certificates.notices(settings, database, datetime.now(UTC))
    finally:
        database.close()
    facts = {"url": settings.public_url, **health, "state_dir": str(settings.state_dir), "notices": notices}
    Output(output).record(facts)


@app.command("renew", epilog="Example: garrison serve renew --config controller.toml")
def renew(config: ConfigOption = None, output: OutputOption = OutputFormat.TABLE) -> None:
    """Issue new server and broker-client certificates, by the same authorities; then restart controller and broker."""
    settings = load_config(config)
    now = datetime.now(UTC)
    device_ca, server_ca = (pki.load_authority(settings, name) for name in (pki.DEVICE_CA, pki.SERVER_CA))
    pki.issue_own(settings, device_ca, server_ca, now)
    Output(output).done(
        "Renewed pki/server.pem and pki/controller.pem. Restart the controller and the broker.",
        {"pki_dir": str(settings.pki_dir)},
    )


@app.command("broker-config", epilog="Example: garrison serve broker-config --config controller.toml --out broker")
def broker_config(
    out: Annotated[Path, typer.Option(help="Folder to write mosquitto.conf and acl into.")],
    config: ConfigOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write Mosquitto's configuration: TLS, client certificates, and each board's own topics."""
    settings = load_config(config)
    pki.check_initialised(settings)
    written = broker.write_broker_config(settings, out)
    Output(output).done(f"Start the broker with: mosquitto -c {written[0]}", {"files": [str(path) for path in written]})


class _Server(uvicorn.Server):
    """Tells systemd when the controller listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            notify("READY=1")


def _uvicorn(controller: Controller, log_level: str) -> uvicorn.Config:
    folder = controller.config.pki_dir
    return uvicorn.Config(
        create_app(controller),
        ssl_certfile=str(folder / f"{pki.SERVER}.pem"),
        ssl_keyfile=str(folder / f"{pki.SERVER}.key"),
        log_config=None,
        log_level=log_level.lower(),
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UnavailableError(
            "controller.port_in_use",
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="end the other process there, or change [http] in the configuration",
        ) from error
    return listening


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Leave a signal that uvicorn has acted on without further effect."""
