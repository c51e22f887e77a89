"""``garrison audit``: verify, list, export boards' records; alarms about them."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, cell
from garrison_controller.cli.times import moment, parse_duration, utc_text
from garrison_protocol.errors import NotFoundError, RefusedError

app = typer.Typer(help="Boards' audit: verify, list, alarms, streams, export.", no_args_is_help=True)

DeviceOption = Annotated[str | None, typer.Option("--device", help="Only this board.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most so many, the newest.")]
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
_CHAINS = {
    "device": "BOARD",
    "stream": "STREAM",
    "epoch": "EPOCH",
    "rows": "ROWS",
    "verdict": "VERDICT",
    "seq": "FIRST BAD",
    "what": "WHAT",
}
_ENTRIES = {"time": "TIME (UTC)", "device": "BOARD", "seq": "SEQ", "kind": "KIND", "facts": "FACTS"}
_ALARMS = {
    "last": "LAST (UTC)",
    "device": "BOARD",
    "code": "ALARM",
    "count": "TIMES",
    "message": "WHAT HAPPENED",
}
_STREAMS = {
    "device": "BOARD",
    "stream": "STREAM",
    "epoch": "EPOCH",
    "up_to": "UP TO",
    "rows": "ROWS",
    "dropped": "DROPPED",
    "duplicates": "CAME AGAIN",
    "hash": "HASH",
}


@app.command(
    "verify",
    epilog="Examples: garrison audit verify --device edge-1\n\n"
    "garrison audit verify --database copy-of-controller.db  (offline, no controller needed)",
)
def verify(
    device: DeviceOption = None,
    database: Annotated[
        Path | None, typer.Option("--database", help="Verify this copy of a controller's SQLite database instead.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Recompute every chain and name the first entry that does not hold. Exit status 6 if there is one."""
    document = _verify_remote(device) if database is None else _verify_copy(database, device)
    if device is not None and not document["chains"]:
        raise NotFoundError(
            "audit.no_chain",
            f"there is no chain of a board {device}: nothing was verified",
            hint="see `garrison device list`; a board that never sent anything has none",
        )
    rows = [chain | _verdict(chain) for chain in document["chains"]]
    total = sum(chain["rows"] for chain in document["chains"])
    bad = [chain for chain in document["chains"] if not chain["ok"]]
    Output(output).table(
        _CHAINS,
        rows,
        document=document,
        empty="No board has sent anything.",
        prose={"what"},
        footer=f"{len(rows)} chains, {total} rows, {len(bad)} bad",
    )
    if bad:
        first = bad[0]
        fault = first["first_bad"]
        raise RefusedError(
            "audit.broken",
            f"{first['device']} {first['stream']} epoch {first['epoch']} entry {fault['seq']}: {fault['what']}",
            hint="keep this database as evidence; the board's own copy and older backups show what stood there",
            device=first["device"],
            seq=fault["seq"],
        )


@app.command("list", epilog="Example: garrison audit list --device edge-1 --kind 'deployment.*' --since 2h")
def list_entries(
    device: DeviceOption = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind; a trailing * matches any rest.")] = None,
    since: Annotated[str | None, typer.Option(help="How far back: 90s, 15m, 2h, 7d.")] = None,
    limit: LimitOption = 100,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """List what boards recorded, by their own clocks."""
    params: dict[str, str | int] = {"limit": limit}
    if device is not None:
        params["device"] = device
    if kind is not None:
        params["kind"] = kind
    if since is not None:
        params["since"] = max(0, int((datetime.now(UTC) - parse_duration(since)).timestamp() * 1000))
    with ApiClient.from_environment() as client:
        document = client.get("/api/v1/audit/entries", params)
    rows = [
        entry | {"time": utc_text(int(entry["time_ms"])), "facts": _DIGEST.sub(r"\1...", cell(entry["facts"]))}
        for entry in document["entries"]
    ]
    Output(output).table(_ENTRIES, rows, document=document, empty=_nothing("No entries", device), prose={"facts"})


@app.command("alarms", epilog="Example: garrison audit alarms --device edge-1")
def alarms(device: DeviceOption = None, limit: LimitOption = 100, output: OutputOption = OutputFormat.TABLE) -> None:
    """List what does not add up: forks, altered rows, lost stores, foreign desired states."""
    params: dict[str, str | int] = {"limit": limit} | ({} if device is None else {"device": device})
    with ApiClient.from_environment() as client:
        document = client.get("/api/v1/audit/alarms", params)
    rows = [alarm | {"last": moment(alarm["last_at"])} for alarm in document["alarms"]]
    Output(output).table(_ALARMS, rows, document=document, empty=_nothing("No alarms", device), prose={"message"})


@app.command("streams", epilog="Example: garrison audit streams -o json")
def streams(device: DeviceOption = None, output: OutputOption = OutputFormat.TABLE) -> None:
    """Show how far every stream of every board has come."""
    params: dict[str, str | int] = {} if device is None else {"device": device}
    with ApiClient.from_environment() as client:
        document = client.get("/api/v1/audit/streams", params)
    rows = [stream | {"hash": str(stream["hash"] or "")[:12]} for stream in document["streams"]]
    Output(output).table(
        _STREAMS, rows, document=document, empty=_nothing("Nothing was sent", device), spare=("hash", "epoch")
    )


@app.command("export", epilog="Example: garrison audit export --out audit.jsonl")
def export(
    out: Annotated[Path, typer.Option("--out", help="File to write; one JSON object a line.")],
    device: DeviceOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write every audit entry with the exact text that was hashed."""
    path = "/api/v1/audit/export" + ("" if device is None else f"?device={device}")
    with ApiClient.from_environment() as client:
        client.download(path, out)
    with out.open(encoding="utf-8") as lines:
        count = sum(1 for line in lines if json.loads(line))
    Output(output).done(f"{out} holds {count} entries", {"file": str(out), "entries": count})


def _nothing(what: str, device: str | None) -> str:
    return f"{what}." if device is None else f"{what} of a board {device}; is that its name in `garrison device list`?"


def _verify_remote(device: str | None) -> dict[str, Any]:
    params: dict[str, str | int] = {} if device is None else {"device": device}
    with ApiClient.from_environment() as client:
        document: dict[str, Any] = client.get("/api/v1/audit/verify", params)
    return document


def _verify_copy(database: Path, device: str | None) -> dict[str, Any]:
    # The database's libraries take long to import, and only this command needs them.
    from garrison_controller.audit.verify import open_copy
    from garrison_controller.audit.verify import verify as verify_all

    with open_copy(database) as session:
        reports = verify_all(session, device)
    return {"ok": all(report.ok for report in reports), "chains": [report.to_dict() for report in reports]}


def _verdict(chain: dict[str, Any]) -> dict[str, Any]:
    fault = chain["first_bad"]
    if fault is None:
        return {"verdict": "ok"}
    kind = f"{fault['kind']}: " if fault["kind"] else ""
    return {"verdict": "BAD", "seq": str(fault["seq"]), "what": kind + fault["what"]}
