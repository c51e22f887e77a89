"""``garrison registry export`` and ``import``: a stick for boards without a network, and what they sent home on it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, counted, note, size
from garrison_protocol import bundle
from garrison_protocol.bundle import Kind
from garrison_protocol.errors import (
    GarrisonError,
    InsufficientError,
    RefusedError,
    UnauthenticatedError,
    UnavailableError,
)
from garrison_protocol.states import Stream
from garrison_protocol.stick import Stick

EXPORT_EXAMPLE = "Example: garrison registry export --bundle /media/stick --devices 'group=/ships/*' --valid-days 60"
IMPORT_EXAMPLE = "Example: garrison registry import /media/stick"
ROOM_BYTES = 4 * 1024 * 1024
"""Left free on the stick, for its own tables and for what boards send home."""

_FROM_CONTROLLER = frozenset({Kind.METADATA, Kind.TARGET, *bundle.DOWN.values()})
_WHOLE_BOARD = frozenset({"access.denied", "device.not_found", "device.unknown", "device.revoked"})
"""Refusals that every file of the board would meet."""
_OUTCOMES = ("new", "repeated", "gap", "refused")


def export_bundle(
    *,
    folder: Annotated[Path, typer.Option("--bundle", help="A folder on the stick; an earlier bundle is renewed.")],
    devices: Annotated[
        str, typer.Option("--devices", help="Boards to carry for: name=, group=, label.KEY=, as in `device list`.")
    ],
    valid_days: Annotated[
        int, typer.Option(min=1, max=365, help="How long boards may install from it; signed metadata may end earlier.")
    ] = 30,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write a bundle for boards without a network: signed metadata, models, desired states, receipts."""
    folder.mkdir(parents=True, exist_ok=True)
    printer = Output(output)
    with ApiClient.from_environment() as client, Stick(folder) as stick:
        answer = client.post("/api/v1/bundles", {"devices": devices, "valid_days": valid_days})
        head = bundle.parse_document(bundle.Head, json.dumps(answer["head"]).encode(), "the controller's answer")
        files = {path: _file(path, data) for path, data in answer["files"].items()}
        blobs = {str(blob["sha256"]): int(blob["size"]) for blob in answer["blobs"]}
        stick.remove(bundle.HEAD)  # from here to the end it is no complete bundle
        copied = _copy(client, stick, devices, files, blobs)
        stick.sync()
        stick.write(bundle.HEAD, [head.model_dump_json(indent=2).encode() + b"\n"])
    valid_until = datetime.fromtimestamp(head.valid_until, UTC)
    printer.done(
        f"{folder} holds a bundle for {counted(len(head.devices), 'board')}, good until "
        f"{valid_until:%Y-%m-%d %H:%M} UTC: {size(sum(copied.values()))} of models copied, "
        f"{len(blobs) - len(copied)} of {len(blobs)} files were there",
        {
            "bundle": str(folder),
            "devices": list(head.devices),
            "valid_until": valid_until.isoformat(),
            "files": len(files),
            "blobs": len(blobs),
            "copied": len(copied),
            "copied_bytes": sum(copied.values()),
        },
    )
    if head.valid_until < head.created + valid_days * 86400:
        note("it ends earlier than asked: a bundle never outlives the metadata in it (see `garrison registry status`)")


def import_bundle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the bundle.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Take in what boards sent home on a stick: status, reports, audit, telemetry, and requests."""
    printer = Output(output)
    rows: list[dict[str, Any]] = []
    with ApiClient.from_environment() as client, Stick(folder) as stick:
        names = [name for name in map(bundle.device_of, stick.names("home", bundle.MAX_DEVICES)) if name]
        with _progress() as progress:
            task = progress.add_task("boards", total=len(names))
            for device in names:
                rows.append(_import_device(client, stick, device))
                progress.advance(task)
        if rows:
            summary = {row["device"]: {name: row[name] for name in _OUTCOMES} for row in rows}
            client.post("/api/v1/bundles/home", {"devices": summary})
    columns = {
        "device": "BOARD",
        "new": "NEW",
        "repeated": "REPEATED",
        "gap": "GAP",
        "refused": "REFUSED",
        "why": "WHY",
    }
    shown = [row | {"why": ", ".join(sorted({one["code"] for one in row["errors"]}))} for row in rows]
    printer.table(columns, shown, document={"devices": rows}, empty=f"No board has sent anything home in {folder}.")
    if rows and all(row["refused"] and not row["new"] + row["repeated"] for row in rows):
        raise RefusedError(
            "bundle.all_refused", f"nothing in {folder} was accepted", hint="see why above; nothing was changed"
        )


def _copy(
    client: ApiClient, stick: Stick, devices: str, files: dict[str, bytes], blobs: dict[str, int]
) -> dict[str, int]:
    """Bring the stick to hold ``files`` and ``blobs``; return the blobs that were copied."""
    with _progress() as progress:
        checking = progress.add_task("checking", total=sum(blobs.values()))
        missing = {}
        for sha256, length in blobs.items():
            if not stick.same(bundle.blob_path(sha256), sha256, length):
                missing[sha256] = length
                stick.remove(bundle.blob_path(sha256))  # damaged, or cut off: its room is needed for the whole one
            progress.advance(checking, length)
        _check_room(stick, files, missing)
        _forget(stick, set(files))
        for path, data in files.items():
            stick.write(path, [data], durable=False)
        copying = progress.add_task("copying", total=sum(missing.values()))
        for sha256, length in missing.items():
            with client.stream(f"/api/v1/bundles/blobs/{sha256}", {"devices": devices}) as pieces:
                stick.write(bundle.blob_path(sha256), _checked(pieces, sha256, length, progress, copying))
    return missing


def _check_room(stick: Stick, files: dict[str, bytes], missing: dict[str, int]) -> None:
    """Refuse what cannot fit before anything is written."""
    replaced = sum(stick.size(path) or 0 for path in files)
    needed = sum(map(len, files.values())) + sum(missing.values()) + ROOM_BYTES
    free = stick.free_bytes()
    if needed > free + replaced:
        raise InsufficientError(
            "bundle.no_room",
            f"the bundle needs {size(needed)}, the stick has {size(free)} left",
            hint="take a larger stick, delete what is on it, or export for fewer boards",
            needed=needed,
            free=free,
        )


def _forget(stick: Stick, kept: set[str]) -> None:
    """Remove what an earlier bundle held for boards and this one does not."""
    for device in filter(None, map(bundle.device_of, stick.names("devices", bundle.MAX_DEVICES))):
        for kind in bundle.DOWN.values():
            path = bundle.device_path(device, kind)
            if path not in kept:
                stick.remove(path)


def _checked(pieces: Iterator[bytes], sha256: str, length: int, progress: Progress, task: TaskID) -> Iterator[bytes]:
    """Pass on what the controller sends, if it is the blob in the end."""
    digest, done = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        done += len(piece)
        if done > length:
            break
        progress.advance(task, len(piece))
        yield piece
    if done != length or digest.hexdigest() != sha256:
        raise UnavailableError(
            "bundle.blob_damaged",
            f"blob {sha256} did not come whole from the controller",
            hint="run the command again; what was copied stays",
            retryable=True,
        )


def _file(path: str, data: str) -> bytes:
    """Return a file of the controller's answer, if it belongs where it says."""
    place = bundle.parse(path)
    try:
        content = base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        content = b""
    if place.kind not in _FROM_CONTROLLER or not 0 < len(content) <= place.max_bytes:
        raise RefusedError("bundle.malformed", f"the controller's answer has no good {path}", hint="read its log")
    return content


def _import_device(client: ApiClient, stick: Stick, device: str) -> dict[str, Any]:
    """Send everything of one board, oldest rows first; return counts of outcomes and the errors."""
    counts: Counter[str] = Counter()
    errors: list[dict[str, Any]] = []
    for path in _paths(stick, device):
        try:
            place = bundle.parse(path)
            data = stick.read(path)
            answer = client.request(
                "PUT",
                f"/api/v1/bundles/home/{quote(device, safe='')}/{place.kind.value}",
                content=data,
                headers={"Content-Type": "application/octet-stream"},
            )
            outcome, error = str(answer["outcome"]), answer["error"]
        except (UnavailableError, UnauthenticatedError) as failure:
            if failure.code != "bundle.unreadable":
                raise  # the controller, not the stick: run it again
            outcome, error = "refused", failure.to_dict()
        except GarrisonError as failure:
            outcome, error = "refused", failure.to_dict()
        counts[outcome] += 1
        if error is not None:
            errors.append({"file": path, "code": error["code"], "message": error["message"]})
            if error["code"] in _WHOLE_BOARD:
                break
    return {"device": device, **{name: counts[name] for name in _OUTCOMES}, "errors": errors}


def _paths(stick: Stick, device: str) -> list[str]:
    folder = bundle.home_folder(device)
    paths = [
        f"{folder}/{stream.value}/{name}"
        for stream in Stream
        for name in stick.names(f"{folder}/{stream.value}", bundle.MAX_BATCHES)
        if name.endswith(".dsse")
    ]
    present = set(stick.names(folder, 64))
    return paths + [f"{folder}/{name}" for name in ("report.dsse", "status.dsse", "request.json") if name in present]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
