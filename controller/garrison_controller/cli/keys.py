"""``garrison registry key``: signers' keys, and which keys the registry trusts with what."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from garrison_controller.cli.ceremony import PassphraseOption, WorkspaceOption, read_passphrase
from garrison_controller.cli.output import Output, OutputFormat, OutputOption
from garrison_controller.signing.families import families
from garrison_controller.signing.key_uris import import_key
from garrison_controller.signing.keys import generate_key, signer_name
from garrison_controller.signing.online import (
    CLOCK_TOLERANCE,
    read_online_keys,
    refuse_known_key,
    replace_authorities,
    replace_fleet_key,
)
from garrison_controller.signing.workspace import Workspace
from garrison_protocol.errors import InvalidError
from garrison_protocol.states import KeyPurpose

app = typer.Typer(no_args_is_help=True, help="Signers' keys, and the controller's online keys.")

ROLES = ("snapshot", "timestamp")
PURPOSES = (KeyPurpose.DIRECTOR, KeyPurpose.RECEIPT, KeyPurpose.LOG)
AUTHORITIES = ("server-ca", "device-ca")


@app.command("generate", epilog="Example: garrison registry key generate alice --out keys")
def generate(
    name: Annotated[str, typer.Argument(help="The signer's name, as every review will show it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for NAME.key and NAME.pub.json.")],
    passphrase_file: PassphraseOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Make a signer's key pair: an encrypted private key that never leaves this signer, and a public key to hand in."""
    files = generate_key(name, out, read_passphrase(passphrase_file, key=name, confirm=True))
    Output(output).done(
        f"{files.private_path} (private, encrypted; keep it) and {files.public_path} (public; hand it in)",
        {
            "name": name,
            "keyid": files.keyid,
            "private": str(files.private_path),
            "public": str(files.public_path),
        },
    )


@app.command("import", epilog="Example: garrison registry key import alice --key 'hsm:2?label=alice' --out keys")
def import_(
    *,
    name: Annotated[str, typer.Argument(help="The signer's name, as every review will show it.")],
    key: Annotated[str, typer.Option("--key", help="URI of the private key: hsm:2?label=TOKEN, file2:PATH, ...")],
    out: Annotated[Path, typer.Option("--out", help="Folder for NAME.pub.json.")],
    public_pem: Annotated[
        Path | None, typer.Option("--public-pem", help="The public half, for keys of a key service.")
    ] = None,
    passphrase_file: PassphraseOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write the public key of a hardware token or key service; the private key stays there."""
    pem = None if public_pem is None else public_pem.read_bytes()
    files = import_key(name, key, out, lambda what: read_passphrase(passphrase_file, key=f"{key} ({what})"), pem)
    Output(output).done(
        f"{files.public_path} (public; hand it in); sign with --key '{key}' --public-key {files.public_path}",
        {"name": name, "keyid": files.keyid, "key": key, "public": str(files.public_path)},
    )


@app.command("list", epilog="Example: garrison registry key list --workspace release")
def list_keys(workspace: WorkspaceOption, output: OutputOption = OutputFormat.TABLE) -> None:
    """List every key that the registry trusts, for what, and until when: as it will be, pending changes included."""
    rows = list(_trusted(Workspace(workspace)))
    columns = {"use": "FOR", "name": "HELD BY", "of": "NEEDED", "kind": "KIND", "until": "UNTIL", "key": "KEY"}
    shown = [row | {"until": row["until"][:10]} for row in rows]
    Output(output).table(columns, shown, document={"keys": rows})


@app.command("rotate", epilog="Example: garrison registry key rotate director --online online.json --workspace release")
def rotate(
    *,
    purpose: Annotated[
        str, typer.Argument(help="director, receipt, log, snapshot, timestamp, server-ca, or device-ca.")
    ],
    online: Annotated[Path, typer.Option("--online", help="online.json, after `garrison serve rotate-key`.")],
    workspace: WorkspaceOption,
    overlap_days: Annotated[
        int, typer.Option(min=0, max=90, help="Days that boards go on accepting the old key; 0 for a stolen one.")
    ] = 0,
    online_days: Annotated[int, typer.Option(min=1, max=3650, help="Days that the new key holds.")] = 1095,
    days: Annotated[
        int | None, typer.Option(min=1, max=1095, help="Days until the new version expires; 365, of a root 730.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Prepare the change to a new online key: fleet.json for the release signers, or a root for the root signers.

    An authority is changed by two versions of fleet.json: one with the old and the new, one with the new alone.
    """
    folder, now = Workspace(workspace), datetime.now(UTC).replace(microsecond=0)
    field = purpose.replace("-", "_") if purpose in AUTHORITIES else purpose
    public = str(getattr(read_online_keys(online), field, ""))
    then = "after the push the controller switches by itself"
    if purpose in ROLES:
        refuse_known_key(folder.current_root().signed, purpose, public)
        role, version = "root", folder.change_online_role(purpose, public, days=days or 730, now=now)
    elif purpose in PURPOSES:
        changed = replace_fleet_key(
            folder.fleet(),
            KeyPurpose(purpose),
            public,
            start=now - CLOCK_TOLERANCE,
            end=now + timedelta(days=online_days),
            overlap_end=now + timedelta(days=overlap_days) if overlap_days else None,
        )
        role, version = "targets", folder.change_fleet(changed, days=days or 365, now=now)
    elif purpose in AUTHORITIES:
        changed = replace_authorities(folder.fleet(), field, public)
        role, version = "targets", folder.change_fleet(changed, days=days or 365, now=now)
        then = f"after the push comes `garrison serve use-ca {purpose}`, or the old one is gone"
    else:
        known = (*PURPOSES, *ROLES, *AUTHORITIES)
        raise InvalidError("key.purpose_unknown", f"{purpose!r} names no online key", hint=f"one of {', '.join(known)}")
    Output(output).done(
        f"{role} version {version} with the new {purpose} waits for signatures; {then}",
        {"purpose": purpose, "public": public, "role": role, "version": version},
    )


def _trusted(workspace: Workspace) -> Iterator[dict[str, str]]:
    root, targets = workspace.current_root().signed, workspace.current_targets().signed
    delegations = targets.delegations
    roles = [(name, root.roles[name], root.keys) for name in ("root", "targets", *ROLES)]
    if delegations is not None:
        roles += [(name, role, delegations.keys) for name, role in families(targets).items()]
    for name, role, keys in roles:
        for keyid in role.keyids:
            key = keys[keyid]
            yield {
                "use": name,
                "name": signer_name(key),
                "of": f"{role.threshold} of {len(role.keyids)}",
                "kind": key.scheme,
                "until": "",
                "key": keyid,
            }
    for one in workspace.fleet().keys:
        until = one.not_after.isoformat()
        yield {
            "use": one.purpose.value,
            "name": "controller",
            "of": "1",
            "kind": "ed25519",
            "until": until,
            "key": one.public,
        }
