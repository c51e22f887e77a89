"""``garrison-agent enroll`` in its forms: with a token, with an invitation, and by files without a network."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from garrison_agent.cli.output import duration, pairs, print_json
from garrison_agent.config import load_config
from garrison_protocol.errors import GarrisonError, InvalidError
from garrison_protocol.ids import is_device_id

if TYPE_CHECKING:
    from garrison_agent.adapters.enrolment import Waiting
    from garrison_agent.identity import Identity
    from garrison_protocol.messages.enrolment import OfflineResponse

MAX_RESPONSE_BYTES = 1024 * 1024
POLL_S = 5.0
POLL_MAX_S = 30.0


def enroll(arguments: argparse.Namespace) -> int:
    """Make this board's keys and have the controller admit it.

    Raises:
        InvalidError: ``enrolment.forms``: none of the forms, or two of them; ``enrolment.empty``;
            ``enrolment.wrong_user``; ``device.name_malformed``.
        GarrisonError: What enrolment refuses.
    """
    if arguments.name and not is_device_id(arguments.name):  # before it is given another one, for ever
        raise InvalidError(
            "device.name_malformed",
            f"{arguments.name!r} cannot name a board",
            hint="use lower-case letters, digits and '-', at most 63",
        )
    _check_user(load_config(arguments.config).state_dir)
    if arguments.offline:
        return _write_request(arguments)
    if arguments.response is not None:
        return _take_response(arguments)
    if arguments.string is None or arguments.out is not None or arguments.root_sha256 is not None:
        raise _forms()
    text = sys.stdin.readline().strip() if arguments.string == "-" else arguments.string
    if not text:
        raise InvalidError("enrolment.empty", "no enrolment string was given", hint="paste it, or pipe it to enroll -")
    from garrison_agent.adapters.enrolment import enrol, give_up

    state_dir = load_config(arguments.config).state_dir
    patience = Patience(arguments.output == "json")
    try:
        identity = enrol(
            state_dir,
            text,
            judge_at=built_or_later,
            name=arguments.name,
            wait=give_up if arguments.no_wait else patience.wait,
        )
    except KeyboardInterrupt:
        patience.interrupted()
        raise
    patience.end()
    _print_identity(identity, arguments.output)
    if arguments.name and arguments.name != identity.device:
        print(f"note: it asked for the name {arguments.name}, and was given {identity.device}", file=sys.stderr)
    return 0


def built_or_later() -> datetime:
    """Return the time to judge certificates by on a board that has no floor yet: not before this version was built."""
    from garrison_agent.core.time_floor import BUILD_S

    return max(datetime.now(UTC), datetime.fromtimestamp(BUILD_S, UTC))


class Patience:
    """Waits for an operator, telling a person at the terminal what for and how long."""

    def __init__(
        self,
        json: bool,
        *,
        sleep: Callable[[float], None] = time.sleep,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._json = json
        self._sleep = sleep
        self._monotonic_s = monotonic_s
        self._since_s: float | None = None
        self._tries = 0
        self._live = sys.stderr.isatty()
        self._told = ""

    def wait(self, waiting: Waiting) -> None:
        """Say what is waited for, and return when it is time to ask again."""
        if self._since_s is None:
            self._since_s = self._monotonic_s()
            self._introduce(waiting)
        due_s = self._monotonic_s() + min(POLL_MAX_S, POLL_S * 1.5**self._tries)
        self._tries += 1
        what = "waiting for approval" if waiting.error is None else "the controller does not answer; trying again"
        if not self._live and what != self._told:
            self._told = what
            print(f"{what} ...", file=sys.stderr, flush=True)
        while (rest_s := due_s - self._monotonic_s()) > 0:
            self._show(f"{what} ({duration(self._monotonic_s() - self._since_s)})")
            self._sleep(min(1.0, rest_s) if self._live else rest_s)

    def interrupted(self) -> None:
        """Say that nothing is lost."""
        self.end()
        if self._since_s is not None:
            print("not approved yet. Nothing is lost: run the same command again at any time;", file=sys.stderr)
            print("keys and fingerprint stay the same, also over a reboot.", file=sys.stderr)

    def end(self) -> None:
        """Take the progress line away."""
        self._show("")

    def _introduce(self, waiting: Waiting) -> None:
        if self._json:
            return
        asked = [("asks for the name", waiting.name)] if waiting.name else []
        print(f"This board has asked to join the fleet at {waiting.url}.\n")
        print(pairs([("its fingerprint", waiting.fingerprint), *asked]))
        print("\nTell it to an operator, who compares it and admits this board with")
        print(f"  garrison device enroll approve {waiting.fingerprint}\n")
        print("Ctrl-C is safe; the same command goes on waiting.\n", flush=True)

    def _show(self, line: str) -> None:
        if self._live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _check_user(state_dir: Path) -> None:
    """Keep root from making keys that the agent's user could not read."""
    try:
        owner = state_dir.stat().st_uid
    except FileNotFoundError:
        return
    if os.geteuid() != 0 or owner == 0:
        return
    import pwd

    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    raise InvalidError(
        "enrolment.wrong_user",
        f"{state_dir} belongs to {name}, who could not read keys that root makes there",
        hint=f"runuser -u {name} -- garrison-agent enroll ...",
    )


def _write_request(arguments: argparse.Namespace) -> int:
    if arguments.string is not None or arguments.response is not None or arguments.out is None or arguments.no_wait:
        raise _forms()
    from garrison_agent.adapters.offline_enrolment import make_request
    from garrison_protocol.messages.enrolment import key_fingerprint

    request = make_request(load_config(arguments.config).state_dir, arguments.name)
    _write(arguments.out, request.model_dump_json(indent=2).encode() + b"\n")
    fingerprint = key_fingerprint(request.identity)
    if arguments.output == "json":
        print_json({"request": str(arguments.out), "fingerprint": fingerprint, "name": request.name})
        return 0
    print(f"wrote {arguments.out}; it holds no secret")
    print(pairs([("fingerprint", fingerprint), ("asks for the name", request.name)]))
    print("\nnext: carry it to an operator, together with the fingerprint, who runs")
    print(f"  garrison device enroll approve --request {arguments.out.name} --out response.json --name NAME")
    print("and gives you response.json, and the digest of the root by another way. Then here:")
    print("  garrison-agent enroll --response response.json --root-sha256 DIGEST")
    return 0


def _take_response(arguments: argparse.Namespace) -> int:
    if arguments.string is not None or arguments.out is not None or arguments.name or arguments.no_wait:
        raise _forms()
    from garrison_agent.adapters.offline_enrolment import accept, read_response

    data = _read(arguments.response)
    offered = read_response(data)
    if arguments.output != "json":
        print("This response wants the board to trust:\n")
        print(_offer(offered))
        print()
    if arguments.root_sha256 is None:
        raise InvalidError(
            "enrolment.root_unconfirmed",
            "give the digest of the root that an operator told you, not the one that stands here",
            hint=f"garrison-agent enroll --response {arguments.response} --root-sha256 DIGEST",
        )
    digest = arguments.root_sha256.strip().lower().removeprefix("sha256:")
    if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise InvalidError("enrolment.root_malformed", "a SHA-256 has 64 hex digits", hint="copy the whole digest")
    identity = accept(load_config(arguments.config).state_dir, data, digest)
    _print_identity(identity, arguments.output)
    return 0


def _offer(response: OfflineResponse) -> str:
    from garrison_protocol.canonical import sha256_hex

    return pairs(
        [
            ("as", response.device),
            ("controller", response.url),
            ("broker", f"{response.mqtt_host}:{response.mqtt_port}"),
            ("root", f"sha256 {sha256_hex(response.root.encode())}"),
            ("server CA", f"sha256 {sha256_hex(response.server_ca_pem.encode())}"),
        ]
    )


def _print_identity(identity: Identity, output: str) -> None:
    from garrison_protocol.messages.enrolment import key_fingerprint

    fingerprint = key_fingerprint(identity.signing_key.public_hex)
    if output == "json":
        print_json(
            {
                "device": identity.device,
                "url": identity.url,
                "fingerprint": fingerprint,
                "state_dir": str(identity.state_dir),
            }
        )
        return
    print(f"enrolled as {identity.device} at {identity.url}")
    print(
        pairs(
            [
                ("fingerprint", fingerprint),
                ("broker", f"{identity.mqtt_host}:{identity.mqtt_port}"),
                ("keys", identity.folders.identity),
            ]
        )
    )
    print("\nnext: systemctl restart garrison-agent (or garrison-agent run)")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RESPONSE_BYTES + 1)
    except OSError as error:
        raise _unusable(path, error) from error
    if len(data) > MAX_RESPONSE_BYTES:
        raise InvalidError("enrolment.response_malformed", f"{path} is too large for a response", hint="check its name")
    return data


def _write(path: Path, data: bytes) -> None:
    """Write a file that leaves on a stick: in place, since FAT has no modes, and synced, since sticks get pulled."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> GarrisonError:
    return InvalidError(
        "cli.file_unusable", f"{path} cannot be used: {error.strerror}", hint="check its path and its owner"
    )


def _forms() -> InvalidError:
    return InvalidError(
        "enrolment.forms",
        "give an enrolment STRING, or --offline with --out FILE, or --response FILE with --root-sha256 DIGEST",
        hint="see `garrison-agent enroll --help`",
    )
