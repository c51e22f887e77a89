"""``garrison registry workspace`` and ``verify``: carry a workspace between signers, and check all of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from garrison_controller.cli.ceremony import WorkspaceOption, show_reviews
from garrison_controller.cli.output import Output, OutputFormat, OutputOption
from garrison_controller.signing.transfer import export_workspace, import_workspace
from garrison_controller.signing.verification import verify_workspace
from garrison_controller.signing.workspace import Workspace

app = typer.Typer(no_args_is_help=True, help="Carry a workspace between signers.")
VERIFY_EXAMPLE = "Example: garrison registry verify --workspace release --root-sha256 DIGEST"

RootDigestOption = Annotated[
    str | None, typer.Option("--root-sha256", help="Digest that 1.root.json must have, as another signer told you.")
]


def verify(
    workspace: WorkspaceOption, root_sha256: RootDigestOption = None, output: OutputOption = OutputFormat.TABLE
) -> None:
    """Check everything in a workspace from its first root on, with no network; exit status 6 if something is wrong."""
    verified = verify_workspace(Workspace(workspace), datetime.now(UTC), root_sha256)
    printer = Output(output)
    printer.record(
        {
            "SHA-256 of 1.root.json": verified.first_root_sha256,
            "published": [f"{role} version {version}" for role, version in verified.versions.items()],
            "expired": list(verified.expired),
            "targets checked": verified.targets,
            "pending": [f"{one.role} version {one.version}" for one in verified.pending],
        },
        document=verified.to_dict(),
    )
    if not printer.json:
        show_reviews(list(verified.pending))


@app.command("export", epilog="Example: garrison registry workspace export --workspace release --out release.tar")
def export(
    workspace: WorkspaceOption,
    out: Annotated[Path, typer.Option("--out", help="New tar file.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write the public files of a workspace to an archive for another signer; there is no private key among them."""
    count = export_workspace(Workspace(workspace), out)
    Output(output).done(f"{out} holds {count} files", {"out": str(out), "files": count})


@app.command("import", epilog="Example: garrison registry workspace import release.tar --workspace release")
def import_(
    source: Annotated[Path, typer.Argument(help="What `export` wrote, or a copy of a workspace's folder.")],
    workspace: WorkspaceOption,
    root_sha256: RootDigestOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Take over versions and signatures from another signer's archive, if all of it verifies and none is older."""
    imported = import_workspace(Workspace(workspace), source, root_sha256, datetime.now(UTC))
    brought = ", ".join(f"{count} new signatures on {role}" for role, count in imported.signatures.items() if count)
    Output(output).done(
        f"{workspace} is up to date with {source}" + (f": {brought}" if brought else ""),
        {"versions": imported.verified.versions, "signatures": imported.signatures},
    )
