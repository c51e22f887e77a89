"""What the controller hands to the ceremony (``online.json``) and where it goes: root metadata and ``fleet.json``."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from tuf.api.metadata import Root

from garrison_controller.devices.ca import fingerprints
from garrison_controller.signing.keys import public_key
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.fleet import Fleet, FleetKey
from garrison_protocol.states import KeyPurpose

CLOCK_TOLERANCE = timedelta(days=1)
"""Online keys are valid from a day before the ceremony: a board's clock may run behind."""


class OnlineKeys(BaseModel):
    """``online.json``: what the controller hands to the ceremony. Keys are raw Ed25519 in hex, CAs are PEM."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    snapshot: str
    timestamp: str
    director: str
    receipt: str
    log: str
    device_ca: str
    server_ca: str


def read_online_keys(path: Path) -> OnlineKeys:
    """Return what the controller wrote to ``path``.

    Raises:
        NotFoundError: ``signing.online_missing``.
        InvalidError: ``signing.online_malformed``.
    """
    if not path.is_file():
        raise NotFoundError("signing.online_missing", f"there is no {path}", hint="`garrison serve init` writes it")
    try:
        return OnlineKeys.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InvalidError("signing.online_malformed", f"{path} is not the controller's online.json") from error


def delegate_online(root: Root, online: OnlineKeys) -> None:
    """Let the controller's keys sign the snapshot and timestamp roles of ``root``.

    Raises:
        InvalidError: ``signing.online_malformed``.
    """
    for role, public in (("snapshot", online.snapshot), ("timestamp", online.timestamp)):
        try:
            root.add_key(public_key(public, f"controller-{role}"), role)
        except ValueError as error:
            raise InvalidError("signing.online_malformed", f"online.json: {role} is no Ed25519 key") from error


def replace_online_key(root: Root, role: str, public_hex: str) -> None:
    """Let ``public_hex``, and no other key, sign ``role`` (snapshot or timestamp) of ``root``.

    Raises:
        InvalidError: ``signing.online_malformed``.
    """
    try:
        key = public_key(public_hex, f"controller-{role}")
    except ValueError as error:
        raise InvalidError("signing.online_malformed", f"{public_hex[:80]!r} is no Ed25519 key") from error
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    root.add_key(key, role)


def refuse_known_key(root: Root, role: str, public_hex: str) -> None:
    """Refuse to rotate ``role`` to the key that ``root`` names already.

    Raises:
        ConflictError: ``signing.online_key_known``.
    """
    if any(root.keys[keyid].keyval.get("public") == public_hex for keyid in root.roles[role].keyids):
        raise _known(f"the root names this {role} key already")


def fleet_document(name: str, online: OnlineKeys, start: datetime, end: datetime) -> bytes:
    """Return ``fleet.json`` with the controller's keys, valid from ``start`` to ``end``, and no floors.

    Raises:
        InvalidError: ``signing.online_malformed``.
    """
    purposes = (
        (KeyPurpose.DIRECTOR, online.director),
        (KeyPurpose.RECEIPT, online.receipt),
        (KeyPurpose.LOG, online.log),
    )
    try:
        keys = tuple(FleetKey(purpose=use, public=public, not_before=start, not_after=end) for use, public in purposes)
        fleet = Fleet(name=name, keys=keys, device_ca=online.device_ca, server_ca=online.server_ca)
    except ValidationError as error:
        raise InvalidError(
            "signing.online_malformed", "the fleet's name or a key in online.json is not valid"
        ) from error
    return fleet_bytes(fleet)


def replace_fleet_key(
    fleet: Fleet, purpose: KeyPurpose, public_hex: str, *, start: datetime, end: datetime, overlap_end: datetime | None
) -> Fleet:
    """Return ``fleet`` with ``public_hex`` as its key for ``purpose``, valid from ``start`` to ``end``.

    Keys for ``purpose`` that are there go, or end at ``overlap_end`` where they would have been valid longer.

    Raises:
        ConflictError: ``signing.online_key_known``.
        InvalidError: ``signing.online_malformed``.
    """
    if any(key.purpose is purpose and key.public == public_hex for key in fleet.keys):
        raise _known(f"fleet.json has this {purpose.value} key already")
    kept = [key for key in fleet.keys if key.purpose is not purpose]
    if overlap_end is not None:
        old = [key for key in fleet.keys if key.purpose is purpose and key.not_before < overlap_end]
        old = [key for key in old if key.not_after > start]
        kept += [key.model_copy(update={"not_after": min(key.not_after, overlap_end)}) for key in old]
    try:
        new = FleetKey(purpose=purpose, public=public_hex, not_before=start, not_after=end)
    except ValidationError as error:
        raise InvalidError("signing.online_malformed", f"online.json: {purpose.value} is no Ed25519 key") from error
    return fleet.model_copy(update={"keys": (*kept, new)})


def replace_authorities(fleet: Fleet, field: str, pem: str) -> Fleet:
    """Return ``fleet`` with the authorities in ``pem`` as its ``device_ca`` or ``server_ca``.

    Raises:
        InvalidError: ``signing.online_malformed``.
        ConflictError: ``signing.online_key_known``.
        RefusedError: ``signing.authority_without_overlap``.
    """
    before, after = fingerprints(getattr(fleet, field)), fingerprints(pem)
    if not after:
        raise InvalidError("signing.online_malformed", f"online.json: {field} holds no certificate")
    if before == after:
        raise _known(f"fleet.json has this {field} already")
    if not before & after:
        raise RefusedError(
            "signing.authority_without_overlap",
            f"no authority in {field} of fleet.json would stay: every board would be cut off at once",
            hint="`garrison serve rotate-key` names the old and the new one; the old one goes by a later version",
        )
    return fleet.model_copy(update={field: pem})


def fleet_bytes(fleet: Fleet) -> bytes:
    """Return ``fleet`` as signers read it: indented, keys sorted."""
    return json.dumps(fleet.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n"


def _known(what: str) -> ConflictError:
    return ConflictError(
        "signing.online_key_known",
        what,
        hint="`garrison serve rotate-key` makes a new one and names it in online.json; take that file",
    )
