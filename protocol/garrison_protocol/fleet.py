"""``fleet.json``: the keys and authorities a fleet trusts beyond the TUF root, itself a TUF target (2 of n).

Boards pin the TUF root and nothing else; they trust no other copy of these keys.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import HexKey, Name, Version, version_key
from garrison_protocol.keys import key_id
from garrison_protocol.states import KeyPurpose

FLEET_TARGET = "fleet.json"
MAX_FLEET_BYTES = 256 * 1024


class FleetKey(BaseModel):
    """An online key with its purpose and validity (aware UTC)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    purpose: KeyPurpose
    public: HexKey
    not_before: AwareDatetime
    not_after: AwareDatetime


class Fleet(BaseModel):
    """What release signers say about the fleet."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: str = "1.0"
    name: Name
    keys: tuple[FleetKey, ...] = Field(max_length=64)
    device_ca: str
    """PEM certificates that sign boards' TLS keys."""
    server_ca: str
    """PEM certificates that sign the controller's and the broker's TLS keys."""
    floors: dict[str, Version] = Field(default_factory=dict)
    """Lowest version of each model name that boards may install."""

    @field_validator("keys", mode="before")
    @classmethod
    def _known_purposes(cls, value: object) -> object:
        """Leave out keys for purposes of a newer Garrison: they sign nothing that this version reads."""
        if not isinstance(value, list | tuple):
            return value

        def known(key: object) -> bool:
            purpose = key.get("purpose") if isinstance(key, dict) else None
            return not isinstance(purpose, str) or purpose in set(KeyPurpose)

        return [key for key in value if known(key)]

    @field_validator("schema_version")
    @classmethod
    def _known_major(cls, value: str) -> str:
        if not value.startswith("1."):
            raise ValueError(f"schema {value} needs a newer Garrison")
        return value

    def public_key(self, purpose: KeyPurpose, signer: str, at: datetime) -> str | None:
        """Return the raw key in hex whose id is ``signer``, if it may sign ``purpose`` at ``at``; else None."""
        for key in self.keys:
            if key.purpose is purpose and key_id(key.public) == signer and key.not_before <= at <= key.not_after:
                return key.public
        return None

    def below_floor(self, name: str, version: str) -> bool:
        """Tell whether the release signers have withdrawn this version."""
        floor = self.floors.get(name)
        return floor is not None and version_key(version) < version_key(floor)


def parse_fleet(data: bytes) -> Fleet:
    """Return the document in ``data``, whose digest the caller has checked against TUF metadata.

    Raises:
        InvalidError: ``fleet.malformed``.
    """
    try:
        return Fleet.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise InvalidError("fleet.malformed", "fleet.json is not valid") from error
