"""Commands of ``garrison device`` that admit boards: tokens, invitations, requests, replacements."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, counted
from garrison_controller.cli.times import moment
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import InvalidError

token_app = typer.Typer(help="Enrolment tokens: for one board, or for a batch.", no_args_is_help=True)
enroll_app = typer.Typer(
    help="Boards that came with an invitation or a file, and wait for a decision.", no_args_is_help=True
)

GroupOption = Annotated[str, typer.Option(help="Group path, with a slash at both ends.")]
LabelOption = Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")]
HoursOption = Annotated[int | None, typer.Option(min=1, max=720, help="How long the line works.")]
Fingerprint = Annotated[
    str, typer.Argument(metavar="FINGERPRINT", help="All eight groups, as the board shows them.", show_default=False)
]
_MAX_REQUEST_BYTES = 64 * 1024

_TOKENS = {
    "id": "ID",
    "kind": "KIND",
    "name": "FOR",
    "group": "GROUP",
    "used": "USED",
    "state": "STATE",
    "expires": "EXPIRES (UTC)",
    "created_by": "BY",
}
_REQUESTS = {
    "fingerprint": "FINGERPRINT",
    "state": "STATE",
    "asked_name": "ASKS FOR",
    "name": "APPROVED AS",
    "address": "FROM",
    "asked": "SINCE (UTC)",
    "expires": "UNTIL (UTC)",
}


@token_app.command(
    "create",
    epilog="Example: garrison device token create edge-1 --group /eu/plant1/ --label site=berlin\n\n"
    "A factory: garrison device token create --batch --uses 50 --prefix edge- --group /eu/plant1/\n\n"
    "Then on the board: garrison-agent enroll 'garrison-enroll:...'",
)
def create_token(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="The board's name; none with --batch.", show_default=False)
    ] = "",
    *,
    batch: Annotated[bool, typer.Option("--batch", help="One line for several boards.")] = False,
    uses: Annotated[int | None, typer.Option(min=1, max=10_000, help="With --batch: for so many boards.")] = None,
    prefix: Annotated[str, typer.Option(help="With --batch: what every board's name begins with, such as edge-.")] = "",
    group: GroupOption = "/",
    label: LabelOption = None,
    hours: HoursOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Print an enrolment string, which admits one board under NAME, or a batch. It cannot be shown again.

    A board of a batch gets the name that it asks for, if that begins with the prefix and is free, or else the prefix
    and the next free number.
    """
    body: dict[str, Any] = {"group": group, "labels": parse_labels(label or []), "hours": hours}
    if batch:
        if name or not prefix or uses is None:
            raise InvalidError(
                "usage.batch", "a batch needs --uses and --prefix, and no NAME", hint="--batch --uses 50 --prefix edge-"
            )
        body |= {"prefix": prefix, "uses": uses}
    else:
        if not name or prefix or uses is not None:
            raise InvalidError(
                "usage.batch",
                "one board needs a NAME; --uses and --prefix belong to --batch",
                hint="garrison device token create edge-1",
            )
        body |= {"name": name}
    with ApiClient.from_environment() as client:
        answer = client.post("/api/v1/enrolment/tokens", body)
    whom = (
        f"up to {counted(uses or 1, 'board')}, to become {prefix}1, {prefix}2, ...;" if batch else f"the board {name};"
    )
    works = "it works" if batch else "it works once,"
    sentence = f"Hand this line to {whom} {works} until {moment(answer['expires_at'])} UTC (token {answer['id']}):"
    Output(output).secret(sentence, answer["enrolment"], answer)


@token_app.command("list", epilog="Example: garrison device token list --all -o json")
def list_tokens(
    every: Annotated[bool, typer.Option("--all", help="Also those that are used, revoked, or expired.")] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """List enrolment tokens for your groups, the newest first. What they admit with is not stored."""
    with ApiClient.from_environment() as client:
        tokens = client.get("/api/v1/enrolment/tokens")["tokens"]
    shown = [token for token in tokens if every or token["state"] == "open"]
    Output(output).table(
        _TOKENS,
        [
            token | {"used": f"{token['uses']} of {token['uses_max']}", "expires": moment(token["expires_at"])}
            for token in shown
        ],
        document=shown,
        empty="No open tokens. See --all, or make one with `garrison device token create NAME`.",
        spare=("created_by", "group"),
    )


@token_app.command("revoke", epilog="Example: garrison device token revoke 7")
def revoke_token(
    token_id: Annotated[int, typer.Argument(metavar="ID", help="As `token list` shows it.", show_default=False)],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """End an enrolment token at once. Boards that it admitted stay: revoke those by `garrison device revoke`."""
    with ApiClient.from_environment() as client:
        answer = client.delete(f"/api/v1/enrolment/tokens/{token_id}")
    admitted = f" It had admitted {', '.join(answer['boards'])}." if answer["boards"] else " It had admitted nobody."
    Output(output).done(f"Token {token_id} ({answer['name']}) has ended.{admitted}", answer)


def invite(output: OutputOption = OutputFormat.TABLE) -> None:
    """Print an invitation: an enrolment string without a token. Boards that come with it wait for your decision.

    It holds no secret, so it may stand in an image for many boards. Whoever knows it can ask; nobody is admitted
    before you compare the board's fingerprint and approve it.
    """
    with ApiClient.from_environment() as client:
        answer = client.get("/api/v1/enrolment/invitation")
    sentence = "Any board may come with this line; decide with `garrison device enroll list` and `approve`:"
    Output(output).secret(sentence, answer["enrolment"], answer)


def rotate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An enrolled or revoked board.", show_default=False)],
    hours: HoursOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Print an enrolment string that gives NAME to a new board, or new keys to the same one.

    Name, group, labels, history and desired state stay. When the string is used, and not before, the present identity
    and its certificates are revoked.
    """
    with ApiClient.from_environment() as client:
        answer = client.post(f"/api/v1/devices/{quote(name, safe='')}/rotate", {"hours": hours})
    sentence = (
        f"Hand this line to the board that becomes {name}; it works once, until {moment(answer['expires_at'])} UTC. "
        f"When it is used, the present {name} is shut out; then let the broker read the revocation list "
        "(`systemctl reload mosquitto`):"
    )
    Output(output).secret(sentence, answer["enrolment"], answer)


@enroll_app.command("list", epilog="Example: garrison device enroll list")
def list_requests(output: OutputOption = OutputFormat.TABLE) -> None:
    """List boards that wait for a decision, were denied, or were approved and have not come back yet."""
    with ApiClient.from_environment() as client:
        found = client.get("/api/v1/enrolment/requests")["requests"]
    waiting = sum(request["state"] == "pending" for request in found)
    Output(output).table(
        _REQUESTS,
        [
            request | {"asked": moment(request["asked_at"]), "expires": moment(request["expires_at"])}
            for request in found
        ],
        document=found,
        empty="No board waits. Invite some with `garrison device invite`.",
        footer=f"{waiting} waiting. Compare the fingerprint with the one that the board shows before you approve it.",
        spare=("expires", "asked", "address"),
    )


@enroll_app.command(
    "approve",
    epilog="Example: garrison device enroll approve 3f1a-90c2-77de-0b41-a2f9-5c33-e810-6d7b --group /eu/plant1/\n\n"
    "By files: garrison device enroll approve --request request.json --out response.json --name edge-7",
)
def approve(
    fingerprint: Annotated[
        str,
        typer.Argument(
            metavar="[FINGERPRINT]",
            help="All eight groups, as the board shows them; none with --request.",
            show_default=False,
        ),
    ] = "",
    *,
    request: Annotated[
        Path | None, typer.Option(help="What `garrison-agent enroll --offline` wrote.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --request: the answer, to be carried to the board.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="The board's name; by default what it asked for.")] = "",
    group: GroupOption = "/",
    label: LabelOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Admit a board whose fingerprint you compared with the one that it shows."""
    body: dict[str, Any] = {"name": name, "group": group, "labels": parse_labels(label or [])}
    if request is None and out is None and fingerprint:
        with ApiClient.from_environment() as client:
            answer = client.post(f"/api/v1/enrolment/requests/{quote(fingerprint, safe='')}/approve", body)
        until = moment(answer["expires_at"])
        Output(output).done(
            f"Approved as {answer['name']}. The board gets in when it asks again, until {until} UTC.", answer
        )
        return
    if request is None or out is None or fingerprint:
        raise InvalidError(
            "usage.approve",
            "give a FINGERPRINT, or --request and --out",
            hint="see `garrison device enroll approve --help`",
        )
    _approve_file(request, out, body, output)


@enroll_app.command("deny", epilog="Example: garrison device enroll deny 3f1a-90c2-77de-0b41-a2f9-5c33-e810-6d7b")
def deny(fingerprint: Fingerprint, output: OutputOption = OutputFormat.TABLE) -> None:
    """Refuse a board that waits. You may approve it later all the same, within a week."""
    with ApiClient.from_environment() as client:
        answer = client.post(f"/api/v1/enrolment/requests/{quote(fingerprint, safe='')}/deny")
    Output(output).done(f"Denied {answer['fingerprint']}.", answer)


def parse_labels(pairs: list[str]) -> dict[str, str]:
    """Return labels from KEY=VALUE texts.

    Raises:
        InvalidError: ``usage.label_malformed``.
    """
    labels = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not key or not sign:
            raise InvalidError("usage.label_malformed", f"{pair!r} is no label", hint="write --label site=berlin")
        labels[key] = value
    return labels


def _approve_file(request: Path, out: Path, body: dict[str, Any], output: OutputFormat) -> None:
    if out.exists():
        raise InvalidError(
            "usage.file_exists", f"{out} exists already", hint="name another file, or remove it: it may be unused"
        )
    with request.open("rb") as file:
        text = file.read(_MAX_REQUEST_BYTES)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidError(
            "enrolment.request_malformed",
            f"{request} is no enrolment request",
            hint="make one on the board: garrison-agent enroll --offline --out request.json",
        ) from error
    with ApiClient.from_environment() as client:
        answer = client.post("/api/v1/enrolment/offline", body | {"request": document})
    out.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")
    digest = sha256_hex(answer["root"].encode())
    summary = {"device": answer["device"], "out": str(out), "root_sha256": digest, "at": datetime.now(UTC).isoformat()}
    Output(output).done(
        f"Admitted {answer['device']}. Carry {out} to the board, and this digest apart from it:\n"
        f"garrison-agent enroll --response {out.name} --root-sha256 {digest}",
        summary,
    )
