"""``garrison registry delegate``: hand model families to signers of their own, in a signers' workspace."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from garrison_controller.cli.ceremony import DaysOption, WorkspaceOption
from garrison_controller.cli.output import Output, OutputFormat, OutputOption
from garrison_controller.signing.delegations import add_delegation, list_delegations, remove_delegation, renew_family
from garrison_controller.signing.keys import load_public
from garrison_controller.signing.workspace import Workspace

app = typer.Typer(no_args_is_help=True, help="Model families with signers of their own.")

NameArgument = Annotated[str, typer.Argument(help="The family's name; its role is called family-NAME.")]


@app.command(
    "add",
    epilog="Example: garrison registry delegate add smollm --workspace release "
    "--path 'models/smollm*/*/manifest.json' --key keys/gina.pub.json --key keys/hugo.pub.json",
)
def add(
    name: NameArgument,
    *,
    workspace: WorkspaceOption,
    path: Annotated[list[str], typer.Option("--path", help="models/FAMILY/*/manifest.json; repeat it.")],
    key: Annotated[list[Path], typer.Option("--key", help="A family signer's .pub.json; repeat it.")],
    threshold: Annotated[int, typer.Option(help="How many of the family's signers must sign.")] = 2,
    days: DaysOption = 365,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Let a family's own signers approve its packages, or change their keys, threshold, or paths."""
    roles = add_delegation(
        Workspace(workspace),
        name,
        paths=path,
        keys=[load_public(one) for one in key],
        threshold=threshold,
        days=days,
        now=datetime.now(UTC),
    )
    Output(output).done(f"{' and '.join(roles)} wait for signatures", {"roles": roles})


@app.command("remove", epilog="Example: garrison registry delegate remove smollm --workspace release")
def remove(
    name: NameArgument,
    workspace: WorkspaceOption,
    days: DaysOption = 365,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Take a family back; release signers take over its packages, but those below their floor."""
    taken = remove_delegation(Workspace(workspace), name, days=days, now=datetime.now(UTC))
    Output(output).done(f"targets takes over {len(taken)} packages and waits for signatures", {"packages": taken})


@app.command("renew", epilog="Example: garrison registry delegate renew smollm --workspace release")
def renew(
    name: NameArgument,
    workspace: WorkspaceOption,
    days: DaysOption = 365,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Prepare a family's next version with the same packages, before its metadata expires, for its signers to sign."""
    version = renew_family(Workspace(workspace), name, days=days, now=datetime.now(UTC))
    Output(output).done(f"family-{name} version {version} waits for signatures", {"version": version})


@app.command("list", epilog="Example: garrison registry delegate list --workspace release")
def list_(workspace: WorkspaceOption, output: OutputOption = OutputFormat.TABLE) -> None:
    """List the families that have signers of their own."""
    found = list_delegations(Workspace(workspace))
    rows = [
        one.to_dict()
        | {
            "paths": ", ".join(one.paths),
            "of": f"{one.threshold} of {len(one.signers)}: {', '.join(one.signers)}",
            "pending": "waits for signatures" if one.pending else "",
        }
        for one in found
    ]
    Output(output).table(
        {"role": "ROLE", "paths": "PATHS", "of": "SIGNERS NEEDED", "version": "VERSION", "packages": "PACKAGES"},
        rows,
        document={"delegations": [one.to_dict() for one in found]},
        empty="Every package is the release signers' own.",
    )
