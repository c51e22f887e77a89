"""``garrison-agent import`` and ``export``: a stick in the network's place, with the rights of whoever calls."""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time

from garrison_agent.api.carrier import ImportProgress, ImportResult
from garrison_agent.api.commands import AliasStatus, ExportPage, StatusView
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.output import pairs, print_json, size, table
from garrison_agent.config import load_config
from garrison_protocol import bundle
from garrison_protocol.bundle import Kind
from garrison_protocol.errors import GarrisonError, RefusedError, UnavailableError
from garrison_protocol.states import DeploymentState, Stream
from garrison_protocol.stick import Stick

POLL_S = 1.0
_FROM_AGENT = frozenset({Kind.STATUS, Kind.REPORT, Kind.REQUEST, Kind.AUDIT, Kind.TELEMETRY})


def import_bundle(arguments: argparse.Namespace) -> int:
    """Let the agent take in a bundle, and tell what came of it."""
    client = AgentClient(load_config(arguments.config).socket_path)
    with Stick(arguments.folder) as stick:
        result = _carry(client, stick)
    waited = [] if arguments.wait is None else _wait(client, result, arguments.wait)
    if arguments.output == "json":
        print_json({**result, "waited": waited})
    else:
        _print(result, waited)
    return _status(result, waited, waits=arguments.wait is not None)


def export_bundle(arguments: argparse.Namespace) -> int:
    """Write what this board sends home to the stick."""
    client = AgentClient(load_config(arguments.config).socket_path)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with Stick(arguments.folder) as stick:
        page: ExportPage = client.post("export", "-")
        device = page["device"]
        _forget(stick, device)
        files = total = 0
        while True:
            for file in page["files"]:
                data = base64.b64decode(file["data"])
                place = bundle.parse(file["path"])
                if place.kind not in _FROM_AGENT or place.device != device:
                    raise RefusedError("bundle.malformed", f"the agent's export has no place for {file['path']}")
                stick.write(file["path"], [data], durable=False)
                files, total = files + 1, total + len(data)
            if page["next"] is None:
                break
            page = client.post("export", page["next"])
        stick.sync()
    done = {"device": device, "folder": str(arguments.folder), "files": files, "bytes": total}
    if arguments.output == "json":
        print_json(done)
    else:
        print(f"{device}: {files} messages ({size(total)}) in {arguments.folder}/{bundle.home_folder(device)}")
        print("take the stick home: garrison registry import DIR; rows stay here until a receipt covers them")
    return 0


def _carry(client: AgentClient, stick: Stick) -> ImportResult:
    """Read to the agent what it asks for until it has had enough.

    Raises:
        GarrisonError: Why the agent could not take the bundle.
    """
    session = str(client.post("bundle")["session"])
    body, headers = b"", dict[str, str]()
    shows = _Bar()
    try:
        while True:
            reply = client.send(body, headers, "bundle", session)
            if "end" in reply:
                result: ImportResult = reply["end"]
                return result
            if "progress" in reply:
                shows.progress(reply["progress"])
                body, headers = b"", {}
                continue
            wanted = reply["ask"]
            headers = {"X-Number": str(int(wanted["number"]))}
            try:
                body = stick.read_piece(str(wanted["path"]), int(wanted["offset"]), int(wanted["length"]))
                shows.read(len(body))
            except GarrisonError as error:
                if isinstance(error, RefusedError | UnavailableError):
                    print(f"{error.message} ({error.code})", file=sys.stderr)
                body = json.dumps({"code": error.code, "message": error.message[:1000]}).encode()
                headers["X-Failed"] = "1"
    finally:
        shows.close()


class _Bar:
    """One line of progress on a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._read_bytes = 0
        self._drawn_at = 0.0
        self._phase = ""

    def read(self, count: int) -> None:
        self._read_bytes += count
        if time.monotonic() - self._drawn_at > 0.2:
            self._draw()

    def progress(self, progress: ImportProgress) -> None:
        share = f" {progress['done'] * 100 // progress['total']} %" if progress["total"] else ""
        self._phase = f"{progress['phase']}{share}"
        self._draw()

    def close(self) -> None:
        if self._shown and self._drawn_at:
            sys.stderr.write("\r\x1b[K")

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if self._shown:
            sys.stderr.write(f"\r\x1b[K{size(self._read_bytes)} read from the stick  {self._phase}")
            sys.stderr.flush()


def _forget(stick: Stick, device: str) -> None:
    """Remove what an earlier export left for this board: rows that a receipt covers need not go again."""
    for kind in bundle.HOME.values():
        stick.remove(bundle.home_path(device, kind))
    for stream in Stream:
        folder = f"{bundle.home_folder(device)}/{stream.value}"
        for name in stick.names(folder, bundle.MAX_BATCHES):
            if name.endswith(".dsse"):
                stick.remove(f"{folder}/{name}")


def _wait(client: AgentClient, result: ImportResult, limit_s: float) -> list[AliasStatus]:
    """Return the aliases that the bundle concerned, once each serves or has failed.

    Raises:
        UnavailableError: ``bundle.wait_over``.
    """
    concerned = {alias["alias"] for alias in result["aliases"]}
    end = time.monotonic() + limit_s
    while True:
        status: StatusView = client.get("status")
        found = [alias for alias in status["aliases"] if alias["alias"] in concerned]
        if all(DeploymentState(alias["state"]).terminal for alias in found):
            return found
        if time.monotonic() >= end:
            states = ", ".join(f"{alias['alias']} is {alias['state']}" for alias in found)
            raise UnavailableError(
                "bundle.wait_over",
                f"after {limit_s:.0f} s: {states}",
                hint="it goes on without this command: garrison-agent status",
                retryable=True,
            )
        time.sleep(min(POLL_S, max(0.0, end - time.monotonic())))


def _status(result: ImportResult, waited: list[AliasStatus], *, waits: bool) -> int:
    """Return the exit status: 6 if something was refused, 1 if a model that was waited for does not serve."""
    if any(item["outcome"] == "refused" for item in result["items"]):
        return RefusedError.exit_status
    failed = any(alias["state"] != DeploymentState.ACTIVE.value for alias in waited)
    return 1 if waits and failed else 0


def _print(result: ImportResult, waited: list[AliasStatus]) -> None:
    until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(result["valid_until"]))
    print(pairs([("board", result["device"]), ("fleet", result["fleet"]), ("bundle good until", f"{until} UTC")]))
    rows = [(item["what"], item["outcome"], item["code"] or "", item["message"]) for item in result["items"]]
    print(table(["PART", "OUTCOME", "CODE", "WHY"], rows))
    if not any(item["outcome"] == "new" for item in result["items"]) and not result["aliases"]:
        print("nothing changed: this board has all of it, or newer")
    aliases = waited or result["aliases"]
    for alias in aliases:
        why = f": {alias['error_code']}: {alias['error_message']}" if alias["error_code"] else ""
        print(f"{alias['alias']}: {alias['package']} is {alias['state']}{why}")
