"""``garrison device``: admit boards, look at them, shut them out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from garrison_controller.cli import enrolment
from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, counted
from garrison_controller.cli.times import moment, parse_duration, utc_text

app = typer.Typer(help="Boards: enrolment, list, details, metrics, replacement, revocation.", no_args_is_help=True)
app.add_typer(enrolment.token_app, name="token")
app.add_typer(enrolment.enroll_app, name="enroll")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The board's name.", show_default=False)]
_PAGE = 500
_SERIAL_DIGITS = 16
"""In lists; `show` and -o json have all of them."""

_COLUMNS = {
    "id": "NAME",
    "group": "GROUP",
    "state": "STATE",
    "online": "ONLINE",
    "last_seen": "LAST SEEN (UTC)",
    "agent_version": "AGENT",
    "cert_end": "CERT UNTIL (UTC)",
    "serial": "SERIAL",
    "fingerprint": "FINGERPRINT",
    "labels": "LABELS",
}
_METRICS = {
    "time": "TIME (UTC)",
    "online": "ONLINE",
    "cpu": "CPU %",
    "memory": "MEM MB",
    "disk_free_mb": "FREE MB",
    "temperature": "°C",
    "requests": "REQ",
    "errors": "ERR",
    "completion_tokens": "TOKENS",
    "ttft_ms_p50": "TTFT MS",
    "tokens_per_s": "TOK/S",
    "loaded": "LOADED",
}


app.command("invite", epilog="Example: garrison device invite > invitation.txt")(enrolment.invite)
app.command("rotate", epilog="Example: garrison device rotate edge-1")(enrolment.rotate)


@app.command("list", epilog="Example: garrison device list --filter 'group=/eu/*,label.site=berlin' -o json")
def list_devices(
    query: Annotated[
        str, typer.Option("--filter", help="name=, group=, label.KEY=; '!=' negates, a trailing * matches any rest.")
    ] = "",
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """List the boards you may see."""
    devices: list[dict[str, Any]] = []
    after: str | None = ""
    with ApiClient.from_environment() as client:
        while after is not None:
            page = client.get("/api/v1/devices", {"filter": query, "after": after, "limit": _PAGE})
            devices += page["devices"]
            after = page["next"]
    Output(output).table(
        _COLUMNS,
        [_row(device) for device in devices],
        document=devices,
        empty="No board fits the filter."
        if query
        else "No boards. Admit one with `garrison device token create NAME`.",
        prose={"labels"},
        spare=("fingerprint", "serial", "agent_version", "cert_end"),
        footer=f"{counted(len(devices), 'board')}, {sum(bool(device['online']) for device in devices)} online",
    )


@app.command("show", epilog="Example: garrison device show edge-1")
def show(name: Name, output: OutputOption = OutputFormat.TABLE) -> None:
    """Show one board: identity, certificate, inventory, and what it last said."""
    with ApiClient.from_environment() as client:
        device = client.get(f"/api/v1/devices/{quote(name, safe='')}")
    fields = {key: value for key, value in device.items() if key not in {"status", "inventory", "earlier_identities"}}
    for key in ("last_seen_at", "enrolled_at", "identity_since", "cert_not_after"):
        if fields.get(key):
            fields[key] = f"{moment(fields[key])} UTC"
    for place, earlier in enumerate(device["earlier_identities"], start=1):
        fields[f"earlier_identity.{place}"] = f"{earlier['fingerprint']}, revoked {moment(earlier['until'])} UTC"
    fields |= {f"inventory.{key}": value for key, value in device["inventory"].items()}
    fields |= {f"status.{key}": _status_text(key, value) for key, value in device["status"].items() if key != "heads"}
    for stream, head in device["status"].get("heads", {}).items():
        fields[f"status.{stream}"] = (
            f"{head['seq']} rows, {head['acked']} acknowledged, epoch {head['epoch']}, head {head['hash'][:12]}"
        )
    Output(output).record(fields, document=device)


@app.command("revoke", epilog="Example: garrison device revoke edge-1 --reason 'stolen from plant 1'")
def revoke(
    name: Name,
    reason: Annotated[str, typer.Option(help="Recorded in the audit.")] = "",
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Shut a board out for ever: its certificate, messages and requests are refused from now on."""
    with ApiClient.from_environment() as client:
        answer = client.post(f"/api/v1/devices/{quote(name, safe='')}/revoke", {"reason": reason})
    Output(output).done(
        f"{name} is revoked. Let the broker read the revocation list too (`systemctl reload mosquitto`).", answer
    )


@app.command("metrics", epilog="Example: garrison device metrics edge-1 --since 2h --limit 50")
def metrics(
    name: Name,
    since: Annotated[str | None, typer.Option(help="How far back: 90s, 15m, 2h, 7d.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many samples, the newest.")] = 100,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show what a board measured, the hours it was offline included."""
    params: dict[str, str | int] = {"limit": limit}
    if since is not None:
        params["since"] = int((datetime.now(UTC) - parse_duration(since)).timestamp() * 1000)
    with ApiClient.from_environment() as client:
        document = client.get(f"/api/v1/devices/{quote(name, safe='')}/metrics", params)
    rows = document["rows"]
    Output(output).table(
        _METRICS,
        [_sample(row) for row in rows],
        document=document,
        empty=f"{name} has sent no samples for that time.",
        footer=summary_line(rows),
        prose={"loaded"},
        spare=("loaded", "temperature", "disk_free_mb"),
    )


def _row(device: dict[str, Any]) -> dict[str, Any]:
    ends = {"last_seen": moment(device["last_seen_at"]), "cert_end": moment(device["cert_not_after"])}
    return device | ends | {"serial": device["cert_serial"][:_SERIAL_DIGITS]}


def summary_line(rows: list[dict[str, Any]]) -> str:
    """Return what the samples say together: rows, rows taken offline, tokens, mean speed."""
    offline = sum(row.get("online") is False for row in rows)
    tokens = sum(int(row.get("completion_tokens") or 0) for row in rows)
    speeds = [int(row["tps_milli"]) / 1000 for row in rows if row.get("tps_milli")]
    speed = f"{sum(speeds) / len(speeds):.1f}" if speeds else "-"
    return f"{len(rows)} rows, {offline} taken offline, {tokens} tokens, mean {speed} tokens/s"


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        "time": utc_text(int(row["time_ms"])),
        "cpu": _scaled(row.get("cpu_permille"), 10),
        "memory": f"{row.get('mem_used_mb', '-')}/{row.get('mem_total_mb', '-')}",
        "loaded": str(row.get("loaded") or "").replace(",", ", "),
        "temperature": _scaled(row.get("temp_mc"), 1000),
        "tokens_per_s": _scaled(row.get("tps_milli"), 1000),
    }


def _status_text(key: str, value: object) -> object:
    return f"{utc_text(value)} UTC" if key == "sent_at" and isinstance(value, int) else value


def _scaled(value: int | None, divisor: int) -> float | None:
    return None if value is None else value / divisor
