"""``garrison access``: who may do what."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from garrison_controller.access.rules import MAX_TOKEN_DAYS, TOKEN_DAYS, Role
from garrison_controller.cli.client import ApiClient, Login, login_path
from garrison_controller.cli.output import Output, OutputFormat, OutputOption, note
from garrison_controller.cli.times import moment, parse_duration
from garrison_controller.config import load_config
from garrison_controller.devices.pki import replace_file
from garrison_protocol.errors import InvalidError

app = typer.Typer(help="Rights: log in, principals, tokens, roles.", no_args_is_help=True)
principal_app = typer.Typer(help="People and services.", no_args_is_help=True)
token_app = typer.Typer(help="API tokens.", no_args_is_help=True)
app.add_typer(principal_app, name="principal")
app.add_typer(token_app, name="token")

PrincipalName = Annotated[str, typer.Argument(metavar="PRINCIPAL", help="Its name.", show_default=False)]


@app.command("bootstrap", epilog="Example: garrison access bootstrap --config controller.toml alice")
def bootstrap(
    name: PrincipalName,
    config: Annotated[Path | None, typer.Option(help="The controller's configuration.")] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """On the controller's own host: create the first security-admin and print its token, once."""
    # Of all verbs here only this one opens the database itself; the others do not wait for its libraries.
    from garrison_controller.access import console

    settings = load_config(config)
    issued = console.bootstrap(settings, name, datetime.now(UTC))
    document = {"principal": name, "token": issued.secret, "expires_at": issued.expires_at.isoformat()}
    Output(output).secret(
        f"Token of {name}, shown only now (until {moment(document['expires_at'])} UTC). Log in with it, where\n"
        f"{settings.pki_dir / 'server-ca.pem'} is the file to trust:\n"
        f"  garrison access login --url {settings.public_url} --ca server-ca.pem",
        issued.secret,
        document,
    )


@app.command(
    "login",
    epilog="Example: garrison access login --url https://fleet.example:8443 --ca server-ca.pem < token.txt",
)
def login(
    url: Annotated[str, typer.Option(help="https://HOST:PORT of the controller.")],
    ca: Annotated[Path | None, typer.Option(help="PEM file of the controller's authority.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar="GARRISON_TOKEN", help="The API token; read from standard input by default.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Store where the controller is and your token, readable by you alone, after trying them."""
    if not token and not sys.stdin.isatty():
        token = sys.stdin.readline().strip()
        if not token:
            raise InvalidError(
                "usage.token_empty",
                "no API token was given",
                hint="pipe it in (`... < token.txt`), set GARRISON_TOKEN, or type it at the prompt",
            )
    secret = token or str(typer.prompt("API token", hide_input=True, err=True))
    wanted = Login(url.rstrip("/"), secret.strip(), ca.resolve() if ca else None)
    with ApiClient(wanted) as client:
        who = client.get("/api/v1/whoami")
    path = login_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, _login_toml(wanted).encode(), 0o600)
    Output(output).done(f"You are {who['name']} at {wanted.url}; stored in {path}.", {"path": str(path), **who})


@app.command("whoami", epilog="Example: garrison access whoami -o json")
def whoami(output: OutputOption = OutputFormat.TABLE) -> None:
    """Show who you are to the controller, and what you may do where."""
    with ApiClient.from_environment() as client:
        answer = client.get("/api/v1/whoami")
    permissions = {name: " ".join(scopes) for name, scopes in answer["permissions"].items()}
    Output(output).record({"name": answer["name"], "id": answer["id"], **permissions}, document=answer)


@principal_app.command("create", epilog="Example: garrison access principal create bob")
def create_principal(
    name: PrincipalName,
    kind: Annotated[str, typer.Option(help="person or service")] = "person",
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Make a person or a service known; it may do nothing yet."""
    with ApiClient.from_environment() as client:
        answer = client.post("/api/v1/access/principals", {"name": name, "kind": kind})
    Output(output).done(f"{name} is known. Next: garrison access grant {name} ROLE --scope /", answer)


@token_app.command("create", epilog="Example: garrison access token create bob --days 30 > bob.token")
def create_token(
    principal: PrincipalName,
    days: Annotated[int, typer.Option(min=1, max=MAX_TOKEN_DAYS, help="How long it lasts.")] = (TOKEN_DAYS),
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Print a new API token, which cannot be shown again."""
    with ApiClient.from_environment() as client:
        answer = client.post("/api/v1/access/tokens", {"principal": principal, "days": days})
    sentence = f"Token of {principal}, shown only now (until {moment(answer['expires_at'])} UTC):"
    Output(output).secret(sentence, answer["token"], answer)


@token_app.command("revoke", epilog="Example: garrison access token revoke 4f1c...  (ids: garrison access list)")
def revoke_token(
    token_id: Annotated[
        str, typer.Argument(metavar="ID", help="As `garrison access list` shows it.", show_default=False)
    ],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """End a token at once."""
    with ApiClient.from_environment() as client:
        client.delete(f"/api/v1/access/tokens/{token_id}")
    Output(output).done("The token has ended.", {"id": token_id})


@app.command("grant", epilog="Example: garrison access grant bob release-manager --scope /eu/plant1/ --for 30d")
def grant(
    principal: PrincipalName,
    role: Annotated[Role, typer.Argument(metavar="ROLE", help=", ".join(Role), show_default=False)],
    scope: Annotated[str, typer.Option(help="Group path, with a slash at both ends.")] = "/",
    lasting: Annotated[str | None, typer.Option("--for", help="End after 12h, 30d, ...; for ever by default.")] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Give a principal a role within a group. Nobody can grant to themselves."""
    until = datetime.now(UTC) + parse_duration(lasting) if lasting else None
    body = {
        "principal": principal,
        "role": role.value,
        "scope": scope,
        "expires_at": until.isoformat() if until else None,
    }
    with ApiClient.from_environment() as client:
        answer = client.post("/api/v1/access/grants", body)
    Output(output).done(f"{principal} is {role.value} of {scope}.", answer)


@app.command("withdraw", epilog="Example: garrison access withdraw 9b2e...  (ids: garrison access list)")
def withdraw(
    grant_id: Annotated[
        str, typer.Argument(metavar="ID", help="As `garrison access list` shows it.", show_default=False)
    ],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Take a role away."""
    with ApiClient.from_environment() as client:
        client.delete(f"/api/v1/access/grants/{grant_id}")
    Output(output).done("The grant is withdrawn.", {"id": grant_id})


@app.command("list", epilog="Example: garrison access list")
def list_access(output: OutputOption = OutputFormat.TABLE) -> None:
    """List principals with their roles and tokens."""
    with ApiClient.from_environment() as client:
        document = client.get("/api/v1/access/principals")
    rows: list[dict[str, Any]] = []
    for principal in document["principals"]:
        who = {"name": principal["name"], "kind": principal["kind"]}
        rows += [{**who, "what": f"{one['role']} of {one['scope']}", **_end(one)} for one in principal["grants"]]
        rows += [{**who, "what": f"token for {', '.join(one['scopes'])}", **_end(one)} for one in principal["tokens"]]
        if not principal["grants"] and not principal["tokens"]:
            rows.append(who)
    columns = {"name": "PRINCIPAL", "kind": "KIND", "what": "WHAT", "until": "UNTIL (UTC)", "id": "ID"}
    Output(output).table(columns, rows, document=document, spare=("kind",))


@app.command("events", epilog="Example: garrison access events --after 120 -o json")
def events(
    after: Annotated[int, typer.Option(min=0, help="Only events with a higher number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many events.")] = 100,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """List what administrators did and were refused, oldest first."""
    with ApiClient.from_environment() as client:
        document = client.get("/api/v1/access/events", {"after": after, "limit": limit})
    columns = {
        "id": "#",
        "time": "TIME (UTC)",
        "principal": "PRINCIPAL",
        "action": "ACTION",
        "subject": "SUBJECT",
        "outcome": "OUTCOME",
        "detail": "DETAIL",
    }
    rows = [event | {"time": moment(event["at"])} for event in document["events"]]
    Output(output).table(columns, rows, document=document, empty="No events.", prose={"detail"})
    if document["next"] is not None and output is OutputFormat.TABLE:
        note(f"There are more: garrison access events --after {document['next']}")


def _end(one: dict[str, Any]) -> dict[str, Any]:
    revoked = one.get("revoked_at")
    return {"until": f"revoked {moment(revoked)}" if revoked else moment(one["expires_at"]), "id": one["id"]}


def _login_toml(login: Login) -> str:
    # A JSON string is a TOML basic string too.
    lines = {"url": login.url, "token": login.token} | ({"ca": os.fspath(login.ca)} if login.ca else {})
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
