"""``garrison rollout``: create, decide, operate, watch."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, note
from garrison_controller.cli.times import duration_text, moment, parse_duration
from garrison_protocol.errors import InvalidError, UnavailableError

app = typer.Typer(help="Rollouts: create, approve, start, pause, resume, stop, watch.", no_args_is_help=True)

Reference = Annotated[str, typer.Argument(metavar="NAME", help="The rollout's name or id.", show_default=False)]
Comment = Annotated[str, typer.Option("--comment", help="Recorded with the decision.")]
_ENDED = frozenset({"FINISHED", "PAUSED", "STOPPED", "APPROVAL_DENIED"})
_COLUMNS = {
    "name": "NAME",
    "status": "STATUS",
    "package": "MODEL",
    "alias": "ALIAS",
    "boards": "BOARDS",
    "created_at": "CREATED (UTC)",
    "pause_reason": "REASON",
}
_BOARD_COLUMNS = {
    "group": "GROUP",
    "device": "BOARD",
    "state": "VERDICT",
    "deployment": "BOARD SAYS",
    "progress": "PROGRESS",
    "error": "ERROR",
}
_PREVIEW_COLUMNS = {"name": "GROUP", "selection": "SELECTION", "count": "BOARDS", "would_take": "WOULD TAKE"}
_COLOURS = {
    "SUCCEEDED": "green",
    "FINISHED": "green",
    "FAILED": "red",
    "ERROR": "red",
    "PAUSED": "red",
    "TIMED_OUT": "yellow",
    "IN_PROGRESS": "cyan",
    "RUNNING": "cyan",
}
_BAR_WIDTH = 20


@app.command(
    "create",
    epilog="Example: garrison rollout create smol-1 --model smollm2-135m-instruct --version 1.0.0"
    " --group canary=name=edge-1 --group rest=* --soak 30s",
)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A new name.", show_default=False)],
    *,
    model: Annotated[str, typer.Option("--model", help="Name of a published model.")],
    version: Annotated[str, typer.Option("--version", help="Its version.")],
    group: Annotated[
        list[str] | None,
        typer.Option("--group", help="GROUP=FILTER or GROUP=NN%; in order; '*' takes the rest. Repeat it."),
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to serve under. [default: the model's own]")] = None,
    scope: Annotated[str, typer.Option(help="Group path; boards elsewhere are never touched.")] = "/",
    query: Annotated[str, typer.Option("--filter", help="Which boards of the scope. See `device list`.")] = "*",
    soak: Annotated[str, typer.Option(help="Time in service before a board counts: 30s, 15m, 2h.")] = "5m",
    success_threshold: Annotated[int, typer.Option(min=1, max=100, help="Percent of a group that must succeed.")] = 100,
    error_threshold: Annotated[int, typer.Option(min=0, max=100, help="Pause above this percent of failures.")] = 0,
    min_executed: Annotated[int, typer.Option(min=1, help="Boards that end before failures are judged.")] = 1,
    queued_timeout: Annotated[str, typer.Option(help="How long a board may take to begin.")] = "1d",
    in_progress_timeout: Annotated[str, typer.Option(help="How long a board may take from beginning to end.")] = "2h",
    max_unavailable: Annotated[
        int | None, typer.Option(min=1, help="Boards of a group that change at the same time. [default: all]")
    ] = None,
    min_tokens_per_s: Annotated[float | None, typer.Option(help="Gate: slower boards go back.")] = None,
    max_ttft_ms: Annotated[float | None, typer.Option(help="Gate: time to first token.")] = None,
    max_rss_mb: Annotated[float | None, typer.Option(help="Gate: memory of the model's worker.")] = None,
    start_on_approval: Annotated[bool, typer.Option(help="Start as soon as it is approved.")] = True,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Create a rollout that waits for approval, and show which boards it would take."""
    limits = {"min_tokens_per_s": min_tokens_per_s, "max_ttft_ms": max_ttft_ms, "max_rss_mb": max_rss_mb}
    body: dict[str, Any] = {
        "name": name,
        "model": model,
        "version": version,
        "alias": alias,
        "scope": scope,
        "target_filter": query,
        "groups": [parse_group(text) for text in group or ["all=*"]],
        "soak_s": _seconds(soak),
        "limits": {key: value for key, value in limits.items() if value is not None},
        "success_threshold": success_threshold,
        "error_threshold": error_threshold,
        "min_executed": min_executed,
        "queued_timeout_s": _seconds(queued_timeout),
        "in_progress_timeout_s": _seconds(in_progress_timeout),
        "max_unavailable": max_unavailable,
        "start_on_approval": start_on_approval,
    }
    with ApiClient.from_environment() as client:
        rollout = client.post("/api/v1/rollouts", body)
    _show(rollout, Output(output))
    if output is OutputFormat.TABLE:
        if not any(one["would_take"] for one in rollout["groups"]):
            note("No board fits now: check --scope, --filter, and --group against `garrison device list`.")
        note(f"Someone else approves it now: `garrison rollout approve {name}`")


@app.command("list", epilog="Example: garrison rollout list -o json")
def list_rollouts(output: OutputOption = OutputFormat.TABLE) -> None:
    """List the rollouts you may see, the newest first."""
    with ApiClient.from_environment() as client:
        document = client.get("/api/v1/rollouts")
    rows = [
        rollout | {"package": _package(rollout), "created_at": _short_time(rollout["created_at"])}
        for rollout in document["rollouts"]
    ]
    Output(output).table(
        _COLUMNS,
        rows,
        document=document,
        empty="No rollouts. Make one with `garrison rollout create`.",
        prose={"pause_reason", "boards"},
        spare=("alias", "created_at", "pause_reason"),
    )


@app.command("show", epilog="Example: garrison rollout show smol-1")
def show(name: Reference, output: OutputOption = OutputFormat.TABLE) -> None:
    """Show a rollout: conditions, decisions, groups, and every board."""
    with ApiClient.from_environment() as client:
        rollout = client.get(_path(name))
    _show(rollout, Output(output))


@app.command("approve", epilog="Example: garrison rollout approve smol-1 --comment 'evaluation looks good'")
def approve(
    name: Reference,
    comment: Comment = "",
    digest: Annotated[
        str | None, typer.Option(help="Approve only if the rollout has this digest. [default: as shown now]")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Approve a rollout. Neither its creator nor the model's publisher can."""
    _decide(name, "approve", comment, digest, output)


@app.command("deny", epilog="Example: garrison rollout deny smol-1 --comment 'wrong plant'")
def deny(name: Reference, comment: Comment = "", output: OutputOption = OutputFormat.TABLE) -> None:
    """Refuse a rollout; it ends here."""
    _decide(name, "deny", comment, None, output)


@app.command("start", epilog="Example: garrison rollout start smol-1")
def start(name: Reference, output: OutputOption = OutputFormat.TABLE) -> None:
    """Start an approved rollout that was created with --no-start-on-approval."""
    _operate(name, "start", None, output)


@app.command("pause", epilog="Example: garrison rollout pause smol-1 --reason 'shift change'")
def pause(
    name: Reference,
    reason: Annotated[str, typer.Option(help="Shown with the rollout.")] = "",
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Take the change back from boards that are not yet loading it, and hand out no more."""
    _operate(name, "pause", {"reason": reason}, output)


@app.command("resume", epilog="Example: garrison rollout resume smol-1")
def resume(name: Reference, output: OutputOption = OutputFormat.TABLE) -> None:
    """Go on where a rollout paused; failures so far do not pause it again."""
    _operate(name, "resume", None, output)


@app.command("stop", epilog="Example: garrison rollout stop smol-1")
def stop(name: Reference, output: OutputOption = OutputFormat.TABLE) -> None:
    """End a rollout: every board that did not succeed gets back what it had before."""
    _operate(name, "stop", None, output)


@app.command("trigger-next-group", epilog="Example: garrison rollout trigger-next-group smol-1")
def trigger_next_group(name: Reference, output: OutputOption = OutputFormat.TABLE) -> None:
    """Begin the next group without waiting for the ones at work. Recorded as your decision."""
    _operate(name, "trigger-next-group", None, output)


@app.command("watch", epilog="Example: garrison rollout watch smol-1 --timeout 10m")
def watch(
    name: Reference,
    interval_s: Annotated[float, typer.Option("--interval", min=0.2, max=60, help="Seconds between looks.")] = 1.0,
    timeout: Annotated[str | None, typer.Option(help="Give up after this time: 90s, 10m.")] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Follow a rollout until it is FINISHED, PAUSED, STOPPED, or denied."""
    deadline = None if timeout is None else time.monotonic() + parse_duration(timeout).total_seconds()
    with ApiClient.from_environment() as client:
        if output is OutputFormat.JSON:
            Output(output).document(_follow(client, name, interval_s, deadline, None))
            return
        with Live(console=Console(highlight=False), refresh_per_second=4, transient=False) as live:
            _follow(client, name, interval_s, deadline, live)


def parse_group(text: str) -> dict[str, str | int]:
    """Return the group that ``NAME=FILTER`` or ``NAME=25%`` means.

    Raises:
        InvalidError: ``usage.group_malformed``.
    """
    name, sign, selection = text.partition("=")
    selection = selection.strip()
    if not name or not sign or not selection:
        raise InvalidError(
            "usage.group_malformed",
            f"{text!r} is no group",
            hint="write --group canary=name=edge-1, --group tenth=10%, or --group 'rest=*'",
        )
    if selection.endswith("%") and selection[:-1].isdigit():
        percent = int(selection[:-1])
        if not 1 <= percent <= 100:
            raise InvalidError("usage.group_malformed", f"{text!r}: a share is 1% to 100%", hint="write tenth=10%")
        return {"name": name, "percent": percent}
    return {"name": name, "filter": selection}


def render(rollout: dict[str, Any]) -> RenderableType:
    """Return a rollout as the live view shows it: one line a board, and what all of it comes to."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("GROUP", "BOARD", "VERDICT", "BOARD SAYS", "PROGRESS", "ERROR"):
        table.add_column(heading, overflow="fold")
    for group in rollout["groups"]:
        for place, board in enumerate(group["boards"]):
            table.add_row(
                Text(f"{group['name']} {group['status']}" if place == 0 else "", _COLOURS.get(group["status"], "")),
                Text(board["device"]),
                Text(board["state"], _COLOURS.get(board["state"], "")),
                Text(board["deployment"] or "-"),
                _progress(board),
                Text(_error(board)),
            )
    head = Text.assemble(
        f"{rollout['name']}  {_package(rollout)}  ", (rollout["status"], _COLOURS.get(rollout["status"], ""))
    )
    if rollout["pause_reason"]:
        head.append(f"  {rollout['pause_reason']}")
    if not any(group["boards"] for group in rollout["groups"]):
        return Group(head, Text("No boards yet: they are chosen when it starts."))
    return Group(head, table)


def _follow(
    client: ApiClient, name: str, interval_s: float, deadline: float | None, live: Live | None
) -> dict[str, Any]:
    while True:
        rollout: dict[str, Any] = client.get(_path(name))
        if live is not None:
            live.update(render(rollout))
        if rollout["status"] in _ENDED:
            return rollout
        if deadline is not None and time.monotonic() >= deadline:
            raise UnavailableError(
                "rollout.watch_timeout",
                f"rollout {rollout['name']} is still {rollout['status']}",
                hint=f"it goes on without you; see `garrison rollout show {rollout['name']}`",
                retryable=True,
            )
        time.sleep(interval_s)


def _decide(name: str, verb: str, comment: str, digest: str | None, output: OutputFormat) -> None:
    with ApiClient.from_environment() as client:
        if digest is None:
            digest = client.get(_path(name))["digest"]
        rollout = client.post(f"{_path(name)}/{verb}", {"digest": digest, "comment": comment})
    Output(output).done(
        f"{rollout['name']} is {rollout['status']}; your decision is bound to digest {rollout['digest']}", rollout
    )


def _operate(name: str, verb: str, body: object, output: OutputFormat) -> None:
    with ApiClient.from_environment() as client:
        rollout = client.post(f"{_path(name)}/{verb}", body)
    Output(output).done(f"{rollout['name']} is {rollout['status']}", rollout)


def _show(rollout: dict[str, Any], output: Output) -> None:
    if output.json:
        output.document(rollout)
        return
    decisions = [f"{one['decision']} by {one['principal']}" for one in rollout["approvals"]]
    output.record(
        {
            "rollout": f"{rollout['name']} ({rollout['id']})",
            "status": rollout["status"],
            "reason": rollout["pause_reason"],
            "model": _package(rollout),
            "alias": rollout["alias"],
            "scope, filter": f"{rollout['scope']}, {rollout['target_filter']}",
            "soak": duration_text(rollout["soak_s"]),
            "limits": rollout["limits"],
            "success, error": f"at least {rollout['success_threshold']} %, at most {rollout['error_threshold']} %"
            f" once {rollout['min_executed']} ended",
            "timeouts": f"queued {duration_text(rollout['queued_timeout_s'])},"
            f" in progress {duration_text(rollout['in_progress_timeout_s'])}",
            "at the same time": rollout["max_unavailable"] or "all boards of a group",
            "created, published": f"{rollout['created_by']}, {rollout['published_by']}",
            "decisions": decisions,
            "digest": rollout["digest"],
        }
    )
    if rollout["outside"] is not None:
        _show_preview(rollout, output)
        return
    rows = [
        {
            "group": f"{group['name']} {group['status']}",
            "device": board["device"],
            "state": board["state"],
            "deployment": board["deployment"],
            "progress": _percent(board),
            "error": _error(board),
        }
        for group in rollout["groups"]
        for board in group["boards"]
    ]
    output.table(_BOARD_COLUMNS, rows, empty="No boards.", prose={"error"})


def _show_preview(rollout: dict[str, Any], output: Output) -> None:
    rows = [
        group
        | {
            "selection": f"{group['percent']}%" if group["filter"] is None else group["filter"],
            "count": str(len(group["would_take"])),
        }
        for group in rollout["groups"]
    ]
    outside = rollout["outside"]
    footer = f"In no group, and never touched: {len(outside)} boards ({', '.join(outside[:20])})" if outside else ""
    output.table(_PREVIEW_COLUMNS, rows, footer=footer, prose={"would_take"})


def _progress(board: dict[str, Any]) -> RenderableType:
    total, done = board["total_bytes"], board["progress_bytes"]
    if board["state"] == "SUCCEEDED":
        return Text("done", "green")
    if not total:
        return Text("-")
    return ProgressBar(total=total, completed=min(done, total), width=_BAR_WIDTH)


def _percent(board: dict[str, Any]) -> str:
    total, done = board["total_bytes"], board["progress_bytes"]
    return f"{100 * min(done, total) // total} %" if total else ""


def _error(board: dict[str, Any]) -> str:
    return ": ".join(part for part in (board["error_code"], board["message"]) if part)


def _package(rollout: dict[str, Any]) -> str:
    return f"{rollout['model']}:{rollout['version']}"


def _short_time(text: str) -> str:
    return (moment(text) or "")[:16]


def _seconds(text: str) -> int:
    return int(parse_duration(text).total_seconds())


def _path(name: str) -> str:
    return f"/api/v1/rollouts/{quote(name, safe='')}"
