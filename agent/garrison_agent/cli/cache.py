"""``garrison-agent cache list|location|remove|verify``."""

from __future__ import annotations

import argparse
import contextlib
import time

from garrison_agent.api.cache_check import CacheCheckView, FileCheck
from garrison_agent.api.commands import CacheView, RemoveResult
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.output import fold, print_json, size, table
from garrison_agent.cli.progress import Bar
from garrison_agent.config import load_config
from garrison_protocol.errors import GarrisonError

_POLL_S = 0.25


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
        print(
            table(
                ["PACKAGE", "VARIANT", "SIZE", "STATE", "IN USE", "PATH"],
                rows,
                right=["SIZE"],
                spare=["PATH", "VARIANT"],
            )
        )
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


def verify_cache(arguments: argparse.Namespace) -> int:
    """Have the agent read every file back, and print what it found; 1 if something is wrong and stays so."""
    client = AgentClient(load_config(arguments.config).socket_path)
    view: CacheCheckView = client.post("cache-check", body={"name": arguments.name, "repair": arguments.repair})
    began_at, bar = time.monotonic(), Bar()
    try:
        while view["state"] not in ("done", "cancelled"):
            doing = "" if view["state"] == "reading" else "repairing "
            bar.draw(view["done_bytes"], view["total_bytes"], f"{doing}{view['path']}")
            time.sleep(_POLL_S)
            view = client.get("cache-check", view["id"])
    except KeyboardInterrupt:
        with contextlib.suppress(GarrisonError):
            client.delete("cache-check", view["id"])
        raise
    finally:
        bar.close()
    wrong = [file for file in view["files"] if file["outcome"] in ("damaged", "missing")]
    if arguments.output == "json":
        print_json({"ok": not wrong, "files": view["files"]})
    elif not view["files"]:
        print("no package is installed")
    else:
        print(_judgement(view["files"], time.monotonic() - began_at))
        if wrong:
            print(_advice(repair=arguments.repair))
    return 1 if wrong or view["state"] == "cancelled" else 0


def _judgement(files: list[FileCheck], seconds: float) -> str:
    heads = ["PACKAGE", "VARIANT", "FILE", "SIZE", "STATE"]
    rows = [
        (file["package"], file["variant"], file["path"], size(file["size_bytes"]), file["outcome"]) for file in files
    ]
    lines = [table(heads, rows, right=["SIZE"], spare=["VARIANT", "SIZE"]), ""]
    lines += [fold(f"{file['package']} {file['path']}: {file['detail']}", "  ") for file in files if file["detail"]]
    total, bad = sum(file["size_bytes"] for file in files), sum(file["outcome"] != "ok" for file in files)
    rate = f", {size(round(total / seconds))}/s" if seconds > 1 else ""
    lines.append(f"{len(files)} files, {size(total)} read{rate}: {f'{bad} wrong' if bad else 'all ok'}")
    return "\n".join(lines)


def _advice(*, repair: bool) -> str:
    if repair:
        return "what could not be repaired is tried again before its next load; the disk may be failing"
    return "repair it with: garrison-agent cache verify --repair"
