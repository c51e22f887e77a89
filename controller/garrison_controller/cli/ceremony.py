"""What the ceremony's commands share: passphrases, reviews on the screen, and the controller as a ``Remote``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from securesystemslib.signer import Signer

from garrison_controller.cli.client import ApiClient
from garrison_controller.cli.output import note, plain
from garrison_controller.signing.key_uris import is_uri, open_uri
from garrison_controller.signing.keys import load_public, load_signer
from garrison_controller.signing.review import Review
from garrison_protocol.errors import InvalidError, NotFoundError

PASSPHRASE_VARIABLE = "GARRISON_KEY_PASSPHRASE"  # noqa: S105 -- the name of a variable, not a secret

WorkspaceOption = Annotated[Path, typer.Option("--workspace", help="The signers' shared folder.")]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help=f"File whose first line is the passphrase; else {PASSPHRASE_VARIABLE}, else a prompt.",
    ),
]
KeyOption = Annotated[
    str,
    typer.Option("--key", help="Your private key: NAME.key, or a URI such as hsm:2?label=TOKEN, with --public-key."),
]
PublicKeyOption = Annotated[
    Path | None, typer.Option("--public-key", help="NAME.pub.json of a key that --key names by URI.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Sign without asking.")]
DaysOption = Annotated[int, typer.Option("--days", min=1, max=1095, help="Days until the new version expires.")]


class ControllerRemote:
    """``signing.sync.Remote`` over the API."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def metadata(self, name: str) -> bytes:
        """Return a TUF metadata file."""
        return self._client.fetch(f"/device/v1/metadata/{name}")

    def target(self, sha256: str, path: str) -> bytes:
        """Return a small target."""
        return self._client.fetch(f"/device/v1/targets/{sha256}/{path}")

    def publish(self, upload: dict[str, object]) -> dict[str, object]:
        """Send signed metadata; return the versions in force."""
        return dict(self._client.post("/api/v1/registry/metadata", upload))


def read_passphrase(file: Path | None, *, key: str, confirm: bool = False) -> str:
    """Return a key's passphrase: from ``file``, from the environment, or from the person at the terminal.

    Raises:
        NotFoundError: ``signing.passphrase_missing``: no such file, or nobody to ask.
    """
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise NotFoundError(
                "signing.passphrase_missing",
                f"cannot read {file}: {error.strerror}",
                hint="name another --passphrase-file",
            ) from error
        return lines[0] if lines else ""
    if (variable := os.environ.get(PASSPHRASE_VARIABLE)) is not None:
        return variable
    try:
        answer = typer.prompt(f"Passphrase of {key}", hide_input=True, confirmation_prompt=confirm, err=True)
    except typer.Abort as error:
        raise NotFoundError(
            "signing.passphrase_missing",
            f"no passphrase for {key} was given",
            hint=f"use --passphrase-file or {PASSPHRASE_VARIABLE}",
        ) from error
    return str(answer)


def open_key(key: str, public_key: Path | None, passphrase_file: Path | None) -> Signer:
    """Return the signer that ``--key`` and its companions name; a passphrase or a PIN is asked for where it is needed.

    Raises:
        InvalidError: ``signing.public_key_missing``.
        GarrisonError: As ``load_signer`` and ``open_uri``.
    """
    if not is_uri(key):
        path = Path(key)
        return load_signer(path, read_passphrase(passphrase_file, key=path.name))
    if public_key is None:
        raise InvalidError(
            "signing.public_key_missing",
            f"the public half of {key} is not named",
            hint="give its NAME.pub.json with --public-key; `garrison registry key import` writes it",
        )
    return open_uri(key, load_public(public_key), lambda what: read_passphrase(passphrase_file, key=f"{key} ({what})"))


def confirm_signing(yes: bool) -> None:
    """Return if the person agrees to sign what was shown.

    Raises:
        InvalidError: ``signing.not_confirmed``.
    """
    if yes:
        return
    try:
        agreed = typer.confirm("Sign this?", default=False, err=True)
    except typer.Abort:  # nobody there to answer
        agreed = False
    if not agreed:
        raise InvalidError("signing.not_confirmed", "nothing was signed", hint="answer y, or give --yes")


def show_reviews(reviews: list[Review]) -> None:
    """Print to standard error, in full, what is about to be signed."""
    for review in reviews:
        note(f"{review.role} version {review.version}, expires {review.expires:%Y-%m-%d}")
        for change in review.changes:
            note(f"  {change.kind}: {plain(change.subject)}")
            for name, value in change.facts.items():
                if value not in ("", 0):
                    note(f"      {name}: {plain(str(value))}")
        for line in progress_lines(review):
            note(f"  {line}")


def progress_lines(review: Review) -> list[str]:
    """Return who has signed and who may still sign, a line for each rule."""
    lines = (
        f"signatures by {one.by}: {len(one.signed)} of {one.threshold} needed"
        + "".join(
            f"; {what}: {', '.join(who)}" for what, who in (("signed", one.signed), ("not yet", one.unsigned)) if who
        )
        for one in review.progress
    )
    return [plain(line) for line in lines]
