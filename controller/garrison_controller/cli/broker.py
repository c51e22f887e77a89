"""``garrison broker``: what the broker between controller and boards has to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from garrison_controller.cli.output import Output, OutputFormat, OutputOption, note
from garrison_controller.config import load_config
from garrison_controller.devices import broker, pki

app = typer.Typer(help="The broker: its configuration.", no_args_is_help=True)
config_app = typer.Typer(help="Write a broker's configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command(
    "mosquitto", epilog="Example: garrison broker config mosquitto --config controller.toml --out broker"
)
def mosquitto(
    out: Annotated[Path, typer.Option(help="Folder to write mosquitto.conf and acl into.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="The controller's configuration (TOML).", show_default=False)
    ] = None,
    user: Annotated[
        str, typer.Option(help="Who the broker becomes when root starts it; by default the owner of its private key.")
    ] = "",
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write Mosquitto's whole configuration, explained: TLS, client certificates, each board's own topics.

    Runs on the controller's host. Written anew, it replaces what was there.
    """
    settings = load_config(config)
    pki.check_initialised(settings)
    conf, acl = broker.write_broker_config(settings, out, user=user)
    if not user and (settings.pki_dir / f"{pki.SERVER}.key").stat().st_uid == 0:
        note("The keys are root's; Mosquitto started by root runs as another user, who cannot read them: give --user.")
    Output(output).done(
        f"Wrote {conf} and {acl}.\nStart the broker with: mosquitto -c {conf}", {"files": [str(conf), str(acl)]}
    )
