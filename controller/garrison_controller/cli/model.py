"""``garrison model``: pack, add, and publish model packages, and look at published ones."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from garrison_controller.cli.ceremony import ControllerRemote, DaysOption, WorkspaceOption
from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, note, size
from garrison_controller.cli.registry import show_publication
from garrison_controller.cli.times import moment
from garrison_controller.signing.metadata import target_digest
from garrison_controller.signing.packing import MakersSignature, Package, PackedBlob, open_package, sources_from_options
from garrison_controller.signing.packing import pack as pack_package
from garrison_controller.signing.sync import push
from garrison_controller.signing.workspace import Workspace
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError
from garrison_protocol.manifest import target_path

app = typer.Typer(no_args_is_help=True, help="Model packages: pack, sign, publish, look.")

Packages = Annotated[list[Path], typer.Argument(help="Package folders, as `garrison model pack` makes them.")]


@app.command(
    "pack", epilog="Example: garrison model pack --manifest draft.json --file model.gguf=smol.gguf --out smol-1.0.0"
)
def pack(
    *,
    manifest: Annotated[Path, typer.Option("--manifest", help="Draft: a manifest whose files have only paths.")],
    file: Annotated[
        list[str], typer.Option("--file", help="NAME=FILE or VARIANT:NAME=FILE; NAME as in the draft. Repeat it.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder for the package.")],
    model_signature: Annotated[
        Path | None, typer.Option("--model-signature", help="The maker's OpenSSF model-signing bundle of these files.")
    ] = None,
    model_signature_key: Annotated[
        Path | None, typer.Option("--model-signature-key", help="The maker's public key, PEM, that it verifies with.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Make a package: sizes, SHA-256, and chunk lists are filled in, files are copied."""
    try:
        draft = manifest.read_bytes()
    except OSError as error:
        raise NotFoundError(
            "package.file_missing", f"cannot read {manifest}: {error.strerror}", hint="name the draft with --manifest"
        ) from error
    signature = _makers_signature(model_signature, model_signature_key)
    with Console(stderr=True).status("Copying and hashing ..."):
        package = pack_package(draft, sources_from_options(file), out, datetime.now(UTC), signature)
    Output(output).done(
        f"{out} holds {package.manifest.id}: {len(package.blobs)} blobs, {size(package.size_bytes)},"
        f" manifest SHA-256 {package.manifest_sha256}",
        _package_facts(package),
    )


@app.command("add", epilog="Example: garrison model add smol-1.0.0 --workspace release")
def add(
    packages: Packages,
    workspace: WorkspaceOption,
    days: DaysOption = 365,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Add packages to the next targets version, which then waits for signatures."""
    folder = Workspace(workspace)
    opened = [open_package(path) for path in packages]
    added = [folder.add_package(package, days=days, now=datetime.now(UTC)) for package in opened]
    roles = {package.manifest.id: _role_of(folder, package) for package in opened}
    names = ", ".join(f"{one} in {role}" for one, role in roles.items())
    what = "wait for signatures" if any(added) else "were added before: nothing changed"
    Output(output).done(
        f"{names}: {what}",
        {
            "targets": folder.current_targets().signed.version,
            "packages": [_package_facts(package) | {"role": roles[package.manifest.id]} for package in opened],
            "added": added,
        },
    )


@app.command("publish", epilog="Example: garrison model publish smol-1.0.0 --workspace release")
def publish(packages: Packages, workspace: WorkspaceOption, output: OutputOption = OutputFormat.TABLE) -> None:
    """Upload the packages' files, continuing where an earlier upload stopped, then publish the signed metadata."""
    printer = Output(output)
    folder = Workspace(workspace)
    opened = [open_package(path) for path in packages]
    for package in opened:
        _refuse_unsigned(folder, package)
    folder.completed()
    with ApiClient.from_environment() as client:
        _upload(client, [blob for package in opened for blob in package.blobs])
        answer = push(folder, ControllerRemote(client))
    show_publication(printer, answer)


@app.command("list", epilog="Example: garrison model list -o json")
def list_models(output: OutputOption = OutputFormat.TABLE) -> None:
    """List published models, newest versions first."""
    with ApiClient.from_environment() as client:
        answer = client.get("/api/v1/models")
    columns = {
        "id": "MODEL",
        "alias": "ALIAS",
        "size": "SIZE",
        "published": "PUBLISHED (UTC)",
        "published_by": "BY",
        "below_floor": "WITHDRAWN",
        "task": "TASK",
        "license": "LICENSE",
    }
    rows = [
        one | {"size": size(one["size_bytes"]), "published": (moment(one["published_at"]) or "")[:16]}
        for one in answer["models"]
    ]
    Output(output).table(
        columns,
        rows,
        document=answer,
        empty="No model is published.",
        prose={"task"},
        spare=("license", "task", "published_by"),
    )


@app.command("show", epilog="Example: garrison model show smollm2:1.0.0")
def show(
    model: Annotated[str, typer.Argument(help="NAME for the newest version, or NAME:VERSION.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show one model with its variants and evaluation."""
    name, _, version = model.partition(":")
    with ApiClient.from_environment() as client:
        if not version:
            found = client.get(f"/api/v1/models/{quote(name, safe='')}")["models"]
            if not found:
                raise NotFoundError(
                    "model.not_found", f"no model {name} is published", hint="see `garrison model list`"
                )
            version = str(found[0]["version"])
        answer = client.get(f"/api/v1/models/{quote(name, safe='')}/versions/{quote(version, safe='')}")
    manifest = answer["manifest"]
    fields = {key: value for key, value in answer.items() if key != "manifest"}
    fields["size_bytes"] = f"{answer['size_bytes']} ({size(answer['size_bytes'])})"
    fields["published_at"] = f"{moment(answer['published_at'])} UTC"
    fields["variants"] = [
        f"{one['name']} ({one['runtime']['engine']}, {size(sum(file['size'] for file in one['files']))})"
        for one in manifest["variants"]
    ]
    fields["evaluation"] = (
        f"{len(manifest['evaluation']['cases'])} cases, accuracy at least {manifest['evaluation']['min_accuracy']}"
    )
    Output(output).record(fields, document=answer)


@app.command("floor", epilog="Example: garrison model floor smollm2 1.1.0 --workspace release")
def floor(
    name: Annotated[str, typer.Argument(help="A model's name.")],
    version: Annotated[str, typer.Argument(help="The lowest version that boards may still install.")],
    workspace: WorkspaceOption,
    days: DaysOption = 365,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Withdraw the versions of a model below VERSION, in the next targets version, which then waits for signatures."""
    folder = Workspace(workspace)
    if not any(path.startswith(f"models/{name}/") for path in folder.every_target()):
        note(
            f"No package of this workspace is called {name}; names are those of `garrison model list`, without version."
        )
    folder.set_floor(name, version, days=days, now=datetime.now(UTC))
    targets = folder.current_targets().signed.version
    Output(output).done(
        f"floor of {name} becomes {version} with targets version {targets}, which waits for signatures",
        {"name": name, "floor": version, "targets": targets},
    )


def _makers_signature(bundle: Path | None, key: Path | None) -> MakersSignature | None:
    if bundle is None and key is None:
        return None
    if bundle is None or key is None:
        raise InvalidError(
            "provenance.incomplete",
            "a model signature needs a bundle and the public key that it shall verify with",
            hint="give --model-signature and --model-signature-key together",
        )
    return MakersSignature(bundle.read_bytes(), key.read_text(encoding="utf-8"))


def _refuse_unsigned(workspace: Workspace, package: Package) -> None:
    manifest = package.manifest
    found = workspace.find_target(target_path(manifest.name, manifest.version))
    if found is None:
        raise ConflictError(
            "package.not_added",
            f"{manifest.id} is in no targets metadata of this workspace",
            hint="`garrison model add`, then have it signed",
        )
    if target_digest(found[1]) != package.manifest_sha256:
        raise InvalidError(
            "package.differs_from_signed",
            f"the manifest in {package.folder} is not the one that was signed for {manifest.id}",
            hint="publish the package that was added",
        )


def _role_of(workspace: Workspace, package: Package) -> str:
    found = workspace.find_target(target_path(package.manifest.name, package.manifest.version))
    assert found is not None
    return f"{found[0]} version {workspace.current_version(found[0])}"


def _upload(client: ApiClient, blobs: list[PackedBlob]) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for blob in {one.sha256: one for one in blobs}.values():
            task = progress.add_task(blob.label, total=blob.size)
            path = f"/api/v1/registry/blobs/{blob.sha256}"
            known = client.head(path) or {}
            offset = int(known.get("x-offset", "0"))
            progress.update(task, completed=offset)
            if known.get("x-complete") != "true":
                client.upload_file(path, blob.path, partial(_advance, progress, task), offset=min(offset, blob.size))
            progress.update(task, completed=blob.size)


def _advance(progress: Progress, task: TaskID, done: int, _total: int) -> None:
    progress.update(task, completed=done)


def _package_facts(package: Package) -> dict[str, object]:
    return {
        "id": package.manifest.id,
        "folder": str(package.folder),
        "manifest_sha256": package.manifest_sha256,
        "blobs": len(package.blobs),
        "size_bytes": package.size_bytes,
    }
