"""``garrison registry``: the signing ceremony. Push, pull, and status reach the controller; the rest is offline."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from garrison_controller.cli import bundle, delegate, keys
from garrison_controller.cli import workspace as workspace_commands
from garrison_controller.cli.ceremony import (
    ControllerRemote,
    DaysOption,
    KeyOption,
    PassphraseOption,
    PublicKeyOption,
    WorkspaceOption,
    YesOption,
    confirm_signing,
    open_key,
    progress_lines,
    show_reviews,
)
from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, note
from garrison_controller.cli.times import moment
from garrison_controller.signing.keys import load_public
from garrison_controller.signing.online import read_online_keys
from garrison_controller.signing.review import review
from garrison_controller.signing.sync import pull as pull_workspace
from garrison_controller.signing.sync import push as push_workspace
from garrison_controller.signing.workspace import RoleKeys, Workspace, first_root_sha256
from garrison_protocol.errors import ConflictError

app = typer.Typer(no_args_is_help=True, help="Sign and publish the model registry's metadata.")
root_app = typer.Typer(no_args_is_help=True, help="The root alone, which says who may sign: rotate, sign.")
targets_app = typer.Typer(no_args_is_help=True, help="The targets alone, which boards may install: sign.")
app.add_typer(keys.app, name="key")
app.add_typer(targets_app, name="targets")
app.add_typer(workspace_commands.app, name="workspace")
app.add_typer(root_app, name="root")
app.add_typer(delegate.app, name="delegate")

KeyFiles = list[Path]


@app.command(
    "init",
    epilog="Example: garrison registry init --workspace release --online online.json --fleet demo "
    "--root-key keys/alice.pub.json --root-key keys/bob.pub.json --root-key keys/carol.pub.json "
    "--targets-key keys/dan.pub.json --targets-key keys/erin.pub.json",
)
def init(
    *,
    workspace: WorkspaceOption,
    online: Annotated[Path, typer.Option("--online", help="The controller's online.json.")],
    fleet: Annotated[str, typer.Option("--fleet", help="The fleet's name.")],
    root_key: Annotated[KeyFiles, typer.Option("--root-key", help="A root signer's .pub.json; repeat it.")],
    targets_key: Annotated[KeyFiles, typer.Option("--targets-key", help="A release signer's .pub.json; repeat it.")],
    root_threshold: Annotated[int, typer.Option(help="How many root signers must sign.")] = 2,
    targets_threshold: Annotated[int, typer.Option(help="How many release signers must sign.")] = 2,
    root_days: Annotated[int, typer.Option(min=1, max=3650, help="Days until root version 1 expires.")] = 730,
    targets_days: Annotated[int, typer.Option(min=1, max=1095, help="Days until targets version 1 expires.")] = 365,
    online_days: Annotated[int, typer.Option(min=1, max=3650, help="Days that the controller's keys hold.")] = 1095,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Start a registry: root version 1 and targets version 1 with fleet.json, both waiting for signatures."""
    created = Workspace.create(
        workspace,
        online=read_online_keys(online),
        fleet=fleet,
        root=RoleKeys("root", tuple(load_public(path) for path in root_key), root_threshold),
        targets=RoleKeys("targets", tuple(load_public(path) for path in targets_key), targets_threshold),
        root_days=root_days,
        targets_days=targets_days,
        online_days=online_days,
        now=datetime.now(UTC),
    )
    Output(output).done(
        f"{workspace} holds root version 1 and targets version 1; now {root_threshold} of {len(root_key)} root signers"
        f" and {targets_threshold} of {len(targets_key)} release signers run `garrison registry sign`",
        {
            "workspace": str(workspace),
            "pending": [one.to_dict() for one in review(created, datetime.now(UTC))],
        },
    )


@app.command("sign", epilog="Example: garrison registry sign --workspace release --key keys/alice.key")
def sign(
    *,
    workspace: WorkspaceOption,
    key: KeyOption,
    public_key: PublicKeyOption = None,
    passphrase_file: PassphraseOption = None,
    yes: YesOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show exactly what waits for signatures, then sign every role that this key may sign."""
    _sign(Workspace(workspace), (key, public_key, passphrase_file), yes, output, lambda _role: True)


@root_app.command("sign", epilog="Example: garrison registry root sign --workspace release --key keys/alice.key")
def sign_root(
    *,
    workspace: WorkspaceOption,
    key: KeyOption,
    public_key: PublicKeyOption = None,
    passphrase_file: PassphraseOption = None,
    yes: YesOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show the root that waits for signatures, and sign it and nothing else."""
    _sign(Workspace(workspace), (key, public_key, passphrase_file), yes, output, lambda role: role == "root")


@targets_app.command("sign", epilog="Example: garrison registry targets sign --workspace release --key keys/dan.key")
def sign_targets(
    *,
    workspace: WorkspaceOption,
    key: KeyOption,
    public_key: PublicKeyOption = None,
    passphrase_file: PassphraseOption = None,
    yes: YesOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show the models, fleet.json, and delegations that wait for signatures, and sign them but no root."""
    _sign(Workspace(workspace), (key, public_key, passphrase_file), yes, output, lambda role: role != "root")


def _sign(
    folder: Workspace,
    key: tuple[str, Path | None, Path | None],
    yes: bool,
    output: OutputFormat,
    wanted: Callable[[str], bool],
) -> None:
    shown = [one for one in review(folder, datetime.now(UTC)) if wanted(one.role)]
    if not shown:
        raise ConflictError(
            "signing.nothing_pending",
            "nothing of this kind waits for a signature",
            hint="see `garrison registry status --workspace`",
        )
    show_reviews(shown)
    confirm_signing(yes)
    roles = {one.role for one in shown}
    outcomes = folder.sign(open_key(*key), roles)
    after = [one for one in review(folder, datetime.now(UTC)) if one.role in roles]
    printer = Output(output)
    if printer.json:
        printer.document(
            {
                "signed": [{"role": one.role, "version": one.version, "new": one.new} for one in outcomes],
                "pending": [one.to_dict() for one in after],
            }
        )
        return
    for outcome in outcomes:
        printer.done(
            f"{'signed' if outcome.new else 'was signed before:'} {outcome.role} version {outcome.version}", None
        )
    for one in after:
        for line in progress_lines(one):
            printer.done(f"{one.role} version {one.version}: {line}", None)
    if all(one.complete for one in after):
        printer.done("complete: publish with `garrison model publish` or `garrison registry push`", None)


@app.command("status", epilog="Example: garrison registry status --workspace release")
def status(
    workspace: Annotated[
        Path | None, typer.Option("--workspace", help="A workspace; without it, what the controller publishes.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show versions, expiries, and signatures: of a workspace, or of the controller."""
    printer = Output(output)
    if workspace is None:
        with ApiClient.from_environment() as client:
            _show_controller(printer, client.get("/api/v1/registry"))
        return
    folder = Workspace(workspace)
    root, targets = folder.published_root(), folder.published_targets()
    folder.current_root()
    waiting = folder.pending_root() is not None or folder.pending_targets() is not None or folder.pending_families()
    reviews = review(folder, datetime.now(UTC)) if waiting else []
    document = {
        "first_root_sha256": first_root_sha256(folder),
        "published": {
            "root": None if root is None else root.signed.version,
            "targets": None if targets is None else targets.signed.version,
        },
        "pending": [one.to_dict() for one in reviews],
    }
    printer.record(
        {
            "SHA-256 of 1.root.json": document["first_root_sha256"],
            "published root": None if root is None else root.signed.version,
            "published targets": None if targets is None else targets.signed.version,
            "pending": [f"{one.role} version {one.version}" for one in reviews],
        },
        document=document,
    )
    if not printer.json:
        show_reviews(reviews)


@app.command("push", epilog="Example: garrison registry push --workspace release")
def push(workspace: WorkspaceOption, output: OutputOption = OutputFormat.TABLE) -> None:
    """Publish what is fully signed; the controller checks it again, then signs snapshot and timestamp."""
    with ApiClient.from_environment() as client:
        answer = push_workspace(Workspace(workspace), ControllerRemote(client))
    show_publication(Output(output), answer)


@app.command("pull", epilog="Example: garrison registry pull --workspace release")
def pull(
    workspace: WorkspaceOption,
    root_sha256: Annotated[
        str | None, typer.Option("--root-sha256", help="Digest of 1.root.json, for a new workspace.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Fetch and verify what is published, before a change or into a new workspace."""
    with ApiClient.from_environment() as client:
        pulled = pull_workspace(Workspace(workspace), ControllerRemote(client), root_sha256)
    Output(output).done(
        f"{workspace} holds root version {pulled.root} and targets version {pulled.targets}",
        {"root": pulled.root, "targets": pulled.targets},
    )


@root_app.command(
    "rotate",
    epilog="Example: garrison registry root rotate --workspace release --remove-root-signer carol "
    "--add-root-key keys/frank.pub.json",
)
def rotate(
    *,
    workspace: WorkspaceOption,
    add_root_key: Annotated[KeyFiles | None, typer.Option(help="A new root signer's .pub.json.")] = None,
    remove_root_signer: Annotated[list[str] | None, typer.Option(help="Name of a root signer to drop.")] = None,
    add_targets_key: Annotated[KeyFiles | None, typer.Option(help="A new release signer's .pub.json.")] = None,
    remove_targets_signer: Annotated[list[str] | None, typer.Option(help="Name of a release signer to drop.")] = None,
    root_threshold: Annotated[int | None, typer.Option(help="A new threshold of the root role.")] = None,
    targets_threshold: Annotated[int | None, typer.Option(help="A new threshold of the targets role.")] = None,
    days: DaysOption = 730,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Prepare the next root version with other signers; a threshold of the old and of the new root keys must sign."""
    added = [("root", load_public(path)) for path in add_root_key or []]
    added += [("targets", load_public(path)) for path in add_targets_key or []]
    removed = [("root", name) for name in remove_root_signer or []]
    removed += [("targets", name) for name in remove_targets_signer or []]
    thresholds = {"root": root_threshold, "targets": targets_threshold}
    version = Workspace(workspace).rotate_root(
        add=added,
        remove=removed,
        thresholds={role: number for role, number in thresholds.items() if number is not None},
        days=days,
        now=datetime.now(UTC),
    )
    Output(output).done(f"root version {version} waits for signatures", {"version": version})


app.command("verify", epilog=workspace_commands.VERIFY_EXAMPLE)(workspace_commands.verify)
app.command("export", epilog=bundle.EXPORT_EXAMPLE)(bundle.export_bundle)
app.command("import", epilog=bundle.IMPORT_EXAMPLE)(bundle.import_bundle)


def show_publication(printer: Output, answer: dict[str, object]) -> None:
    """Print what a push achieved."""
    if printer.json:
        printer.document(answer)
        return
    packages = answer["packages"]
    assert isinstance(packages, list)
    what = "nothing new: published already" if answer["unchanged"] else f"published {', '.join(packages) or 'metadata'}"
    printer.done(
        f"{what}; root {answer['root']}, targets {answer['targets']}, snapshot {answer['snapshot']},"
        f" timestamp {answer['timestamp']}",
        None,
    )
    if not answer["unchanged"]:
        note("boards learn of it at once, or when they are back")


def _show_controller(printer: Output, document: dict[str, object]) -> None:
    roles, of_families = document["roles"], document["families"]
    assert isinstance(roles, dict)
    assert isinstance(of_families, dict)
    rows = [
        {
            "role": role,
            **facts,
            "expires": moment(facts["expires"]),
            "of": f"{facts['threshold']} of {facts['keys']}",
        }
        for role, facts in (roles | of_families).items()
    ]
    printer.table(
        {"role": "ROLE", "version": "VERSION", "expires": "EXPIRES (UTC)", "of": "SIGNERS NEEDED"},
        rows,
        document=document,
        footer=f"fleet {document['fleet']}, SHA-256 of 1.root.json {document['first_root_sha256']}",
    )
