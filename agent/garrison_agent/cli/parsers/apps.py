"""The commands about applications that share the board's local API."""

from __future__ import annotations

import argparse
from typing import Any

from garrison_agent.cli.parsers.declare import add_command, add_group, late


def add_to(commands: Any) -> None:
    """Declare ``app add``, ``list``, ``show``, and ``remove``."""
    apps = add_group(commands, "app", "applications that share this board's API: their keys and limits")
    add = add_command(
        apps,
        "add",
        late("apps", "add_app"),
        "make a key for an application",
        [
            "garrison-agent app add camera",
            "garrison-agent app add camera --models smollm2,magika --rate 60 --tokens-per-min 20000 --concurrent 2",
            "garrison-agent app add console --admin -o json | jq -r .key",
        ],
        notes="The key is shown once. Clients send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'. On the unix\n"
        "socket members of its group need none. For other limits, or a new key, remove it and add it again.",
    )
    add.add_argument("name", metavar="NAME", help="lower case, digits, '.', '_', '-'")
    add.add_argument(
        "--models", metavar="A,B", type=_names, default=[], help="the only models that it may use (default: all)"
    )
    add.add_argument("--rate", metavar="N", type=_limit, default=0, help="requests a minute (default: no limit)")
    add.add_argument(
        "--tokens-per-min",
        metavar="N",
        type=_limit,
        default=0,
        help="tokens a minute, prompts and answers together (default: no limit)",
    )
    add.add_argument(
        "--concurrent", metavar="N", type=_limit, default=0, help="requests in progress at once (default: no limit)"
    )
    add.add_argument("--admin", action="store_true", help="it may also load, unload, and remove models over TCP")
    add_command(
        apps,
        "list",
        late("apps", "list_apps"),
        "list applications, their limits, and what they used since the agent started",
        ["garrison-agent app list"],
    )
    show = add_command(
        apps, "show", late("apps", "show_app"), "show one application", ["garrison-agent app show camera"]
    )
    show.add_argument("name", metavar="NAME", help="as `app list` shows it")
    remove = add_command(
        apps,
        "remove",
        late("apps", "remove_app"),
        "forget an application; its key opens nothing from now on",
        ["garrison-agent app remove camera"],
    )
    remove.add_argument("name", metavar="NAME", help="as `app list` shows it")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one model")
    return names


def _limit(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value
