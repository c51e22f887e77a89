"""``import`` and ``export``: a stick in the network's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from garrison_agent.cli.parsers.declare import add_command, late

WAIT_S = 1800.0
"""How long ``import --wait`` waits unless told otherwise."""


def add_to(commands: Any) -> None:
    """Register the commands."""
    taken = add_command(
        commands,
        "import",
        late("stick", "import_bundle"),
        "take in a bundle from a stick: metadata, desired state, models, receipts",
        ["garrison-agent import /media/stick", "garrison-agent import /media/stick --wait 600"],
        notes="Needs no network. Everything is verified as if the network had brought it; an older bundle changes "
        "nothing.\nExit status 6 if a part was refused, 1 if a model that was waited for does not serve.",
    )
    taken.add_argument("folder", metavar="DIR", type=Path, help="the folder that `garrison registry export` wrote")
    taken.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        nargs="?",
        const=WAIT_S,
        help=f"wait until the models serve or have failed, at most so long (default: {WAIT_S:.0f})",
    )
    sent = add_command(
        commands,
        "export",
        late("stick", "export_bundle"),
        "write what this board sends home to a stick: status, audit, telemetry, requests",
        ["garrison-agent export /media/stick"],
        notes="Take it to the controller: garrison registry import DIR",
    )
    sent.add_argument("folder", metavar="DIR", type=Path, help="a folder on the stick")
