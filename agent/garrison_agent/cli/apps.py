"""``garrison-agent app add|list|show|remove``."""

from __future__ import annotations

import argparse

from garrison_agent.api.commands import AddedApp, AppView
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.output import moment, pairs, print_json, table
from garrison_agent.config import load_config


def add_app(arguments: argparse.Namespace) -> int:
    """Make an application and print its key, this once."""
    wanted = {
        "name": arguments.name,
        "models": arguments.models,
        "requests_per_min": arguments.rate,
        "tokens_per_min": arguments.tokens_per_min,
        "concurrent": arguments.concurrent,
        "admin": arguments.admin,
    }
    added: AddedApp = _client(arguments).post("apps", body=wanted)
    if arguments.output == "json":
        print_json(added)
    else:
        print(pairs([*_facts(added), ("key", added["key"])]))
        print("\nThe key is not shown again. Clients send it as: Authorization: Bearer KEY")
    return 0


def list_apps(arguments: argparse.Namespace) -> int:
    """Print every application."""
    views: list[AppView] = _client(arguments).get("apps")
    if arguments.output == "json":
        print_json(views)
    elif not views:
        print("no applications; make one with: garrison-agent app add NAME")
    else:
        heads = ["NAME", "MODELS", "REQ/MIN", "TOKENS/MIN", "AT ONCE", "ADMIN", "REQUESTS", "TOKENS"]
        rows = [
            (
                view["name"],
                ",".join(view["models"]) or "all",
                view["requests_per_min"] or None,
                view["tokens_per_min"] or None,
                view["concurrent"] or None,
                view["admin"],
                view["requests"],
                view["tokens"],
            )
            for view in views
        ]
        print(table(heads, rows, right=["REQ/MIN", "TOKENS/MIN", "AT ONCE", "REQUESTS", "TOKENS"]))
    return 0


def show_app(arguments: argparse.Namespace) -> int:
    """Print one application."""
    view: AppView = _client(arguments).get("apps", arguments.name)
    if arguments.output == "json":
        print_json(view)
    else:
        used = [("requests", view["requests"]), ("tokens", view["tokens"])]
        print(pairs([*_facts(view), *used]))
    return 0


def remove_app(arguments: argparse.Namespace) -> int:
    """Forget an application."""
    view: AppView = _client(arguments).delete("apps", arguments.name)
    if arguments.output == "json":
        print_json(view)
    else:
        print(f"removed {view['name']}; its key opens nothing any more")
    return 0


def _client(arguments: argparse.Namespace) -> AgentClient:
    return AgentClient(load_config(arguments.config).socket_path)


def _facts(view: AppView) -> list[tuple[str, object]]:
    return [
        ("name", view["name"]),
        ("models", ", ".join(view["models"]) or "all"),
        ("requests a minute", view["requests_per_min"] or "no limit"),
        ("tokens a minute", view["tokens_per_min"] or "no limit"),
        ("requests at once", view["concurrent"] or "no limit"),
        ("admin", view["admin"]),
        ("created", moment(view["created_at"])),
    ]
