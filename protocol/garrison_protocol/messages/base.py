"""What every message shares."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import DeviceId


class Part(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(Part):
    """A body of an envelope. ``sent_at`` (ms since 1970, the sender's clock) is information, never a decision."""

    v: str = "1.0"
    device: DeviceId
    sent_at: int = 0

    @field_validator("v")
    @classmethod
    def _known_major(cls, value: str) -> str:
        if value.split(".", maxsplit=1)[0] != "1":
            raise ValueError(f"protocol {value} needs a newer Garrison")
        return value


M = TypeVar("M", bound=Message)


def parse_message(model: type[M], body: bytes, *, device: str) -> M:
    """Return ``body`` as ``model``, once it names the board that its topic names.

    Raises:
        InvalidError: ``message.malformed`` or ``message.misaddressed``.
    """
    try:
        message = model.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        raise InvalidError("message.malformed", f"this is no valid {model.__name__.lower()} message") from error
    if message.device != device:
        raise InvalidError(
            "message.misaddressed", f"a message of {message.device} on a topic of {device}", device=device
        )
    return message


def encode(message: Message) -> bytes:
    """Return the exact bytes to seal."""
    return message.model_dump_json(exclude_none=True).encode()
