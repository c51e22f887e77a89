"""``garrison-agent cache list|location|remove``."""

from __future__ import annotations

import argparse

from garrison_agent.api.commands import CacheView, RemoveResult
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.output import print_json, size, table
from garrison_agent.config import load_config


def list_cache(arguments: argparse.Namespace) -> int:
    """Print the installed packages and the space they take."""
    view: CacheView = AgentClient(load_config(arguments.config).socket_path).get("cache")
    if arguments.output == "json":
        print_json(view)
        return 0
    if view["entries"]:
        rows = [
            (entry["id"], entry["variant"], size(entry["size_bytes"]), entry["state"], entry["in_use"], entry["path"])
            for entry in view["entries"]
        ]
        print(table(["PACKAGE", "VARIANT", "SIZE", "STATE", "IN USE", "PATH"], rows, right=["SIZE"]))
        print()
    print(f"{view['location']}: {view['used_mb']} MiB used, {view['free_mb']} MiB free")
    return 0


def show_location(arguments: argparse.Namespace) -> int:
    """Print the folder that holds model files; works while the agent is down."""
    location = load_config(arguments.config).state_dir / "blobs"
    if arguments.output == "json":
        print_json({"location": str(location)})
    else:
        print(location)
    return 0


def remove_from_cache(arguments: argparse.Namespace) -> int:
    """Delete one installed package that nothing uses."""
    client = AgentClient(load_config(arguments.config).socket_path)
    result: RemoveResult = client.delete("cache", arguments.name)
    if arguments.output == "json":
        print_json(result)
    else:
        print(f"removed {result['id']}, {size(result['freed_bytes'])} freed")
    return 0
