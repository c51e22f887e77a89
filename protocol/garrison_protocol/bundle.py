"""The layout of a bundle: registry and messages of some boards as files on a stick (docs/protocol.md, "Bundles").

Pure: paths and small documents; ``stick`` reads and writes the files. Paths are relative, with ``/`` between parts,
and lower case, and no part is a device name of DOS, so that every file system keeps them apart. Nothing in a bundle is
believed for standing there: its metadata and envelopes are what the network would have carried, and are verified alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_protocol.envelope import MAX_ENVELOPE_BYTES
from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import DeviceId, is_device_id
from garrison_protocol.manifest import MAX_FILE_BYTES, MAX_MANIFEST_BYTES
from garrison_protocol.messages.anchor import NONCE_PATTERN
from garrison_protocol.messages.enrolment import RenewRequest
from garrison_protocol.states import Stream

FORMAT = "garrison-bundle/v1"
HEAD = "bundle.json"
MAX_DEVICES = 10_000
MAX_METADATA_BYTES = 32 * 1024 * 1024
MAX_DOCUMENT_BYTES = 128 * 1024
MAX_HEAD_BYTES = 1024 * 1024
MAX_BATCHES = 20_000
"""Of one stream of one board: more than a board keeps."""
MAX_PATH_LENGTH = 400
RENEWAL_NONCE = re.compile(r"stick:(\d{1,16})")
"""Nonces of carried renewals are the board's own numbers, each above the last: the controller cannot be asked."""

M = TypeVar("M", bound=BaseModel)


class Head(BaseModel):
    """``bundle.json``, written last: a bundle without it is not complete. Nothing in it is believed."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: str = Field(default=FORMAT, pattern=rf"^{FORMAT}$")
    fleet: str = Field(max_length=128)
    created: int = Field(ge=0, lt=2**40)
    """Unix seconds, as is ``valid_until``."""
    valid_until: int = Field(ge=0, lt=2**40)
    devices: tuple[DeviceId, ...] = Field(default=(), max_length=MAX_DEVICES)


class HomeRequest(BaseModel):
    """``home/<id>/request.json``: what the board asks its next bundle for. Only ``renew`` is signed."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    nonce: str = Field(pattern=NONCE_PATTERN)
    """Of the anchor that the board waits for."""
    renew: RenewRequest | None = None


class Kind(StrEnum):
    """What a file of a bundle is."""

    HEAD = "head"
    METADATA = "metadata"
    TARGET = "target"
    BLOB = "blob"
    DESIRED = "desired"
    RECEIPT_AUDIT = "receipt-audit"
    RECEIPT_TELEMETRY = "receipt-telemetry"
    ANCHOR = "anchor"
    RENEWAL = "renewal"
    STATUS = "status"
    REPORT = "report"
    AUDIT = "audit"
    TELEMETRY = "telemetry"
    REQUEST = "request"


DOWN = {
    "anchor.dsse": Kind.ANCHOR,
    "desired.dsse": Kind.DESIRED,
    "receipt-audit.dsse": Kind.RECEIPT_AUDIT,
    "receipt-telemetry.dsse": Kind.RECEIPT_TELEMETRY,
    "renew.json": Kind.RENEWAL,
}
"""Files of ``devices/<id>/``, in the order in which a board takes them: a new store needs the anchor first."""
HOME = {"status.dsse": Kind.STATUS, "report.dsse": Kind.REPORT, "request.json": Kind.REQUEST}
"""Files of ``home/<id>/`` beside the streams' folders."""

_NAMES = {kind: name for name, kind in (DOWN | HOME).items()}
_MAX_BYTES = {
    Kind.HEAD: MAX_HEAD_BYTES,
    Kind.METADATA: MAX_METADATA_BYTES,
    Kind.TARGET: MAX_MANIFEST_BYTES,
    Kind.BLOB: MAX_FILE_BYTES,
    Kind.RENEWAL: MAX_DOCUMENT_BYTES,
    Kind.REQUEST: MAX_DOCUMENT_BYTES,
}
_METADATA = re.compile(r"timestamp\.json|[1-9][0-9]{0,15}\.[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?\.json")
_PART = re.compile(r"[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BATCH = re.compile(r"([0-9a-f]{16})-([0-9]{12}|[1-9][0-9]{12,15})\.dsse")
_DOS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_ESCAPE = "_"
"""Set behind a part that DOS would take for a device; no part of ours ends so."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a path of a bundle stands for. Fields that its kind has no use for are empty."""

    kind: Kind
    device: str = ""
    name: str = ""
    """The metadata file's or the target's name."""
    sha256: str = ""
    epoch: str = ""
    first: int = 0

    @property
    def max_bytes(self) -> int:
        """How many bytes such a file may have."""
        return _MAX_BYTES.get(self.kind, MAX_ENVELOPE_BYTES)


def metadata_path(name: str) -> str:
    """Return where the metadata file lies that TUF calls ``name``.

    Raises:
        InvalidError: ``bundle.name_unknown``.
    """
    if _METADATA.fullmatch(name) is None:
        raise _unknown(name)
    return f"metadata/{name}"


def target_path(path: str, sha256: str) -> str:
    """Return where the target ``path`` with the digest ``sha256`` lies.

    Raises:
        InvalidError: ``bundle.name_unknown``.
    """
    parts = path.split("/")
    if _SHA256.fullmatch(sha256) is None or any(_PART.fullmatch(part) is None for part in parts):
        raise _unknown(path)
    return f"targets/{sha256}/" + "/".join(map(_escaped, parts))


def blob_path(sha256: str) -> str:
    """Return where a blob lies.

    Raises:
        InvalidError: ``bundle.name_unknown``.
    """
    if _SHA256.fullmatch(sha256) is None:
        raise _unknown(sha256)
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def device_folder(device: str) -> str:
    """Return the folder of what is for ``device``."""
    return f"devices/{_escaped(device)}"


def home_folder(device: str) -> str:
    """Return the folder of what ``device`` sends home."""
    return f"home/{_escaped(device)}"


def device_path(device: str, kind: Kind) -> str:
    """Return the file of ``kind`` (one of ``DOWN``) for ``device``."""
    return f"{device_folder(device)}/{_NAMES[kind]}"


def home_path(device: str, kind: Kind) -> str:
    """Return the file of ``kind`` (one of ``HOME``) by ``device``."""
    return f"{home_folder(device)}/{_NAMES[kind]}"


def batch_path(device: str, stream: Stream, epoch: str, first: int) -> str:
    """Return the file of the batch that begins with row ``first``."""
    return f"{home_folder(device)}/{stream.value}/{epoch}-{first:012d}.dsse"


def device_of(folder: str) -> str | None:
    """Return the board whose folder below ``devices`` or ``home`` is called ``folder``, if one's is."""
    device = folder.removesuffix(_ESCAPE)
    return device if is_device_id(device) and _escaped(device) == folder else None


def parse(path: str) -> Place:
    """Return what the file at ``path`` is.

    Raises:
        InvalidError: ``bundle.name_unknown`` for every path that nothing here builds.
    """
    if len(path) <= MAX_PATH_LENGTH:
        match path.split("/"):
            case ["bundle.json"]:
                return Place(Kind.HEAD)
            case ["metadata", name] if _METADATA.fullmatch(name):
                return Place(Kind.METADATA, name=name)
            case ["targets", sha256, *parts] if parts and _SHA256.fullmatch(sha256):
                name = "/".join(part.removesuffix(_ESCAPE) for part in parts)
                if all(map(_PART.fullmatch, name.split("/"))) and target_path(name, sha256) == path:
                    return Place(Kind.TARGET, name=name, sha256=sha256)
            case ["blobs", "sha256", start, sha256] if _SHA256.fullmatch(sha256) and sha256.startswith(start):
                if blob_path(sha256) == path:
                    return Place(Kind.BLOB, sha256=sha256)
            case ["devices", folder, name] if name in DOWN and (device := device_of(folder)):
                return Place(DOWN[name], device)
            case ["home", folder, name] if name in HOME and (device := device_of(folder)):
                return Place(HOME[name], device)
            case ["home", folder, ("audit" | "telemetry") as stream, name] if device := device_of(folder):
                found = _BATCH.fullmatch(name)
                if found is not None:
                    return Place(Kind(stream), device, epoch=found[1], first=int(found[2]))
    raise _unknown(path)


def parse_document(model: type[M], data: bytes, what: str) -> M:
    """Return the document ``what`` (a path) in ``data``.

    Raises:
        InvalidError: ``bundle.malformed``.
    """
    try:
        return model.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise InvalidError(
            "bundle.malformed", f"{what} is not of a form that this version reads", hint="export the bundle again"
        ) from error


def _escaped(part: str) -> str:
    return part + _ESCAPE if _DOS.fullmatch(part) else part


def _unknown(name: str) -> InvalidError:
    return InvalidError("bundle.name_unknown", f"no file of a bundle is called {name[:MAX_PATH_LENGTH]!r}")
