"""What the controller hands to the ceremony (``online.json``) and where it goes: root metadata and ``fleet.json``."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from tuf.api.metadata import Root

from garrison_controller.signing.keys import public_key
from garrison_protocol.errors import InvalidError, NotFoundError
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


def fleet_bytes(fleet: Fleet) -> bytes:
    """Return ``fleet`` as signers read it: indented, keys sorted."""
    return json.dumps(fleet.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n"
