"""``garrison serve``: create, run and look at the controller itself, on its own host."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn

from garrison_controller.api.app import create_app
from garrison_controller.cli.client import ApiClient, Login
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, note
from garrison_controller.config import ControllerConfig, load_config
from garrison_controller.db.base import Database
from garrison_controller.db.migrations import upgrade
from garrison_controller.devices import authorities, pki, queries, rotation
from garrison_controller.devices.keyring import find_passphrase, read_passphrase
from garrison_controller.jobs import certificates
from garrison_controller.systemd import notify
from garrison_controller.wiring import Controller
from garrison_protocol.errors import InvalidError, NotFoundError, UnavailableError

app = typer.Typer(help="The controller itself: create, run, look at it.", no_args_is_help=True)

AuthorityArgument = Annotated[str, typer.Argument(metavar="NAME", help="server-ca or device-ca.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML; /etc/garrison/controller.toml by default.")]
GRACE_S = 5
KEEP_ALIVE_S = 30
BACKLOG = 1024


@app.command("init", epilog="Example: garrison serve init --config controller.toml --passphrase-file passphrase")
def init(
    config: ConfigOption = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(help="File whose first line encrypts the private keys; else what the configuration names."),
    ] = None,
    unencrypted_keys: Annotated[
        bool, typer.Option("--unencrypted-keys", help="Write the private keys as they are, readable by their owner.")
    ] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Create keys, authorities and the database; write online.json for the signing ceremony."""
    settings = load_config(config)
    passphrase = _choose_passphrase(settings, passphrase_file, unencrypted=unencrypted_keys)
    online = pki.initialise(settings, datetime.now(UTC), passphrase)
    upgrade(settings.database_url)
    if passphrase is not None and find_passphrase(settings) is None:
        note('Name the passphrase in the configuration: [keys] passphrase_file = "FILE"')
    Output(output).done(
        f"Created {settings.state_dir}. Next, with this --config:\n"
        "  garrison broker config mosquitto --out broker   the broker's configuration\n"
        "  garrison serve run                              the controller\n"
        "  garrison access bootstrap NAME                  the first person\n"
        f"Signers then begin with: garrison registry init --online {online}",
        {"state_dir": str(settings.state_dir), "online": str(online), "encrypted": passphrase is not None},
    )


@app.command("encrypt-keys", epilog="Example: garrison serve encrypt-keys --config controller.toml")
def encrypt_keys(
    config: ConfigOption = None,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="The new passphrase; else what the configuration names.")
    ] = None,
    current_passphrase_file: Annotated[
        Path | None, typer.Option(help="What opens the keys now, if they are encrypted with another one.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Encrypt the private keys of a controller, or change their passphrase; then restart it. Cut off, run it again."""
    settings = load_config(config)
    passphrase = _choose_passphrase(settings, passphrase_file, unencrypted=False)
    assert passphrase is not None
    current = None if current_passphrase_file is None else read_passphrase(current_passphrase_file)
    changed = rotation.encrypt(settings, current, passphrase)
    Output(output).done(
        f"{len(changed)} private keys are encrypted now. Copies on this disk and in backups are not: "
        "rotate the keys if somebody may have them. Restart the controller.",
        {"changed": [str(path) for path in changed]},
    )


@app.command("rotate-key", epilog="Example: garrison serve rotate-key director --config controller.toml")
def rotate_key(
    purpose: Annotated[
        str, typer.Argument(help="snapshot, timestamp, director, receipt, log, server-ca, or device-ca.")
    ],
    config: ConfigOption = None,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the new key that waits instead.")] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Make a new online key, or authority, and name it in online.json, for the signers to publish."""
    settings = load_config(config)
    if purpose in authorities.TITLES:
        Output(output).done(*_rotate_authority(settings, purpose, discard=discard))
        return
    if discard:
        public = rotation.discard(settings, purpose)
        what = f"The new {purpose} key is deleted; online.json names the present one again."
    else:
        public = rotation.stage(settings, purpose)
        what = (
            f"A new {purpose} key waits, {public}. Next: `garrison registry key rotate {purpose} --online"
            f" {pki.online_path(settings)}`, sign, push; the controller switches by itself then."
        )
    Output(output).done(what, {"purpose": purpose, "public": public, "online": str(pki.online_path(settings))})


@app.command("use-ca", epilog="Example: garrison serve use-ca server-ca --config controller.toml")
def use_ca(
    name: AuthorityArgument,
    config: ConfigOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also if boards, or the broker, are not known to accept it yet.")
    ] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Sign with the new authority from now on, the controller's own certificates first; then restart both."""
    settings = load_config(config)
    with _authority(settings, name) as database:
        authority = authorities.use(settings, database, name, datetime.now(UTC), force=force)
        with database.reading() as session:
            strings = len(queries.open_tokens(session, datetime.now(UTC))) if name == pki.SERVER_CA else 0
    what = f"The new {name} is in force. Restart the controller and the broker."
    if strings:
        what += f" {strings} enrolment strings and every invitation name the old one: make new ones after the restart."
    Output(output).done(what, {"name": name, "sha256": authority.fingerprint, "strings_ended": strings})


@app.command("retire-ca", epilog="Example: garrison serve retire-ca server-ca --config controller.toml")
def retire_ca(
    name: AuthorityArgument,
    config: ConfigOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also if boards, or servers, still need the old one.")] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Leave the old authority out of online.json; once release signers have published that, it is gone."""
    settings = load_config(config)
    with _authority(settings, name) as database:
        authority = authorities.retire(settings, database, name, datetime.now(UTC), force=force)
    Output(output).done(
        f"online.json names the new {name} alone. Next: `garrison registry key rotate {name} --online"
        f" {pki.online_path(settings)}`, sign, push; the controller deletes the old one then."
        " After that restart the broker.",
        {"name": name, "sha256": authority.fingerprint, "online": str(pki.online_path(settings))},
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


def _rotate_authority(settings: ControllerConfig, name: str, *, discard: bool) -> tuple[str, dict[str, object]]:
    """Stage or discard an authority; return what to say about it."""
    online = pki.online_path(settings)
    with _authority(settings, name) as database:
        if discard:
            authority = authorities.discard(settings, database, name, datetime.now(UTC))
            what = f"The new {name} is deleted; online.json names the present one alone again."
        else:
            authority = authorities.stage(settings, database, name, datetime.now(UTC))
            first = "restart the broker, " if name == pki.DEVICE_CA else ""
            what = (
                f"A new {name} waits, sha256 {authority.fingerprint}. Next: {first}`garrison registry key rotate {name}"
                f" --online {online}`, sign, push; then `garrison serve use-ca {name}`."
            )
    return what, {"purpose": name, "sha256": authority.fingerprint, "online": str(online)}


@contextmanager
def _authority(settings: ControllerConfig, name: str) -> Iterator[Database]:
    """Give the database to a command that changes the authority ``name``.

    Raises:
        InvalidError: ``key.authority_unknown``.
        NotFoundError: ``controller.not_initialised``.
    """
    if name not in authorities.TITLES:
        raise InvalidError(
            "key.authority_unknown", f"{name!r} names no authority", hint=f"one of {', '.join(authorities.TITLES)}"
        )
    pki.check_initialised(settings)
    database = Database(settings.database_url)
    try:
        yield database
    finally:
        database.close()


def _choose_passphrase(settings: ControllerConfig, given: Path | None, *, unencrypted: bool) -> bytes | None:
    """Return what encrypts the private keys; None where the operator said that nothing shall."""
    passphrase = find_passphrase(settings) if given is None else read_passphrase(given)
    if unencrypted and passphrase is not None:  # also a configured one: `run` would refuse plain keys beside it
        raise InvalidError(
            "key.passphrase_unwanted",
            "there is a passphrase, and --unencrypted-keys says that there shall be none",
            hint="leave one of them out",
        )
    if passphrase is None and not unencrypted:
        raise NotFoundError(
            "key.passphrase_missing",
            "nothing says what encrypts the private keys",
            hint="name a file with --passphrase-file, or accept plain files with --unencrypted-keys",
        )
    return passphrase


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
