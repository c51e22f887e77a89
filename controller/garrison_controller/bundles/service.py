"""What goes into a bundle for some boards: metadata, targets, blobs by their digests, and what is for each board."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, TargetFile, Timestamp

from garrison_controller.audit.tables import StreamState
from garrison_controller.bundles.tables import CarriedRequest
from garrison_controller.devices import anchors, queries
from garrison_controller.devices.filter import Term
from garrison_controller.devices.tables import ENROLLED, Device
from garrison_controller.registry.service import Registry
from garrison_controller.registry.store import TIMESTAMP
from garrison_controller.registry.tables import Package
from garrison_controller.rollouts.tables import DesiredState
from garrison_controller.signing.metadata import file_name, target_digest
from garrison_protocol import bundle, envelope
from garrison_protocol.bundle import Kind
from garrison_protocol.errors import InvalidError, NotFoundError
from garrison_protocol.fleet import FLEET_TARGET
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import parse_manifest, target_path
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.enrolment import RenewResponse
from garrison_protocol.messages.streams import RECEIPT_KIND, Receipt
from garrison_protocol.states import Stream

MAX_VALID_DAYS = 365
_RECEIPTS = {Stream.AUDIT: Kind.RECEIPT_AUDIT, Stream.TELEMETRY: Kind.RECEIPT_TELEMETRY}


@dataclass(frozen=True, slots=True)
class Blob:
    """A model file or chunk list that some chosen board needs."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything but the blobs' bytes. ``files`` by path, without ``bundle.json``."""

    head: bundle.Head
    files: dict[str, bytes]
    blobs: tuple[Blob, ...]


@dataclass(frozen=True, slots=True)
class Keys:
    """What a bundle's messages are signed with, and where boards find the broker."""

    director: SigningKey
    receipt: SigningKey
    board_mqtt: tuple[str, int]


def chosen(session: Session, terms: tuple[Term, ...], scopes: Sequence[str]) -> list[Device]:
    """Return the admitted boards that the filter means and that lie in ``scopes``.

    Raises:
        InvalidError: ``bundle.too_many_devices``.
        NotFoundError: ``bundle.no_device``.
    """
    found, more = queries.page(session, terms, scopes, after="", limit=bundle.MAX_DEVICES)
    if more:
        raise InvalidError(
            "bundle.too_many_devices",
            f"the filter means more than {bundle.MAX_DEVICES} boards",
            hint="export several bundles, each with a narrower filter",
        )
    admitted = [device for device in found if device.state == ENROLLED]
    if not admitted:
        raise NotFoundError(
            "bundle.no_device",
            "the filter means no admitted board that you may carry bundles for",
            hint="see `garrison device list --filter FILTER`",
        )
    return admitted


def collect(
    session: Session, registry: Registry, stamp: bytes, devices: Sequence[Device], *, keys: Keys, now: datetime
) -> Contents:
    """Return what goes into a bundle for ``devices``. Inside the caller's transaction, which it only reads in.

    ``stamp`` is the timestamp to carry (``Registry.carry_timestamp``); what is published later is not in the bundle.

    Raises:
        NotFoundError: ``registry.empty``.
        GarrisonError: ``registry.store_damaged``.
    """
    files, targets = _metadata(registry, stamp)
    packages = _packages(session, [device.id for device in devices])
    wanted = {FLEET_TARGET, *(target_path(package.name, package.version) for package in packages)}
    for path in sorted(wanted & set(targets)):
        files[bundle.target_path(path, target_digest(targets[path]))] = registry.store.read_target(targets[path])
    for device in devices:
        files |= _of_device(session, device, keys, now)
    expires = Metadata[Timestamp].from_bytes(stamp).signed.expires
    head = bundle.Head(
        fleet=registry.get_fleet().name,
        created=int(now.timestamp()),
        valid_until=int(expires.timestamp()),
        devices=tuple(device.id for device in devices),
    )
    return Contents(head, files, blobs_of(packages))


def needed_blobs(session: Session, devices: Sequence[Device]) -> dict[str, int]:
    """Return the blobs that the desired states of ``devices`` need: sizes by digest."""
    return {blob.sha256: blob.size for blob in blobs_of(_packages(session, [device.id for device in devices]))}


def blobs_of(packages: Iterable[Package]) -> tuple[Blob, ...]:
    """Return files and chunk lists of every variant: which one a board takes, it decides itself."""
    found: dict[str, int] = {}
    for package in packages:
        for variant in parse_manifest(package.manifest.encode()).variants:
            for file in variant.files:
                if file.size:
                    found[file.chunks_sha256] = 32 * -(-file.size // file.chunk_size)
                found[file.sha256] = file.size
    return tuple(Blob(sha256, size) for sha256, size in sorted(found.items()))


def _metadata(registry: Registry, stamp: bytes) -> tuple[dict[str, bytes], dict[str, TargetFile]]:
    """Return the metadata files that ``stamp`` leads to with all roots, by path, and the targets by theirs."""
    store = registry.store
    published = store.leads_to(stamp)
    files = {bundle.metadata_path(f"{version}.root.json"): data for version, data in store.roots().items()}
    snapshot = published.snapshot.signed
    versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}
    for role, version in {"snapshot": snapshot.version, **versions}.items():
        name = file_name(role, version)
        data = store.find_metadata(name)
        if data is not None:  # a family that was taken back may have been tidied away
            files[bundle.metadata_path(name)] = data
    files[bundle.metadata_path(TIMESTAMP)] = stamp
    return files, {path: target for path, (_, target) in published.every_target.items()}


def _packages(session: Session, devices: Sequence[str]) -> list[Package]:
    """Return the packages that the boards' newest desired states name."""
    digests: set[str] = set()
    rows = session.execute(select(DesiredState.device_id, DesiredState.body).where(DesiredState.counter > 0))
    wanted = set(devices)
    for device, body in rows:
        if device in wanted:
            digests |= {alias.package.manifest_sha256 for alias in Desired.model_validate_json(body).aliases}
    found = session.scalars(select(Package).order_by(Package.name, Package.version))
    return [package for package in found if package.manifest_sha256 in digests]


def _of_device(session: Session, device: Device, keys: Keys, now: datetime) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    desired = session.get(DesiredState, device.id)
    if desired is not None and desired.counter > 0:
        files[bundle.device_path(device.id, Kind.DESIRED)] = desired.envelope
    for stream, state in anchors.newest_streams(session, device).items():
        receipt = encode(_receipt(device.id, state, now))
        sealed = envelope.seal(RECEIPT_KIND, receipt, keys.receipt)
        files[bundle.device_path(device.id, _RECEIPTS[Stream(stream)])] = sealed
    asked = session.get(CarriedRequest, device.id)
    if asked is not None and asked.identity_public == device.identity_public:
        sealed = anchors.anchor(session, device.id, asked.nonce, keys.director, now)
        files[bundle.device_path(device.id, Kind.ANCHOR)] = sealed
        if asked.certificate_pem:
            host, port = keys.board_mqtt
            answer = RenewResponse(certificate_pem=asked.certificate_pem, mqtt_host=host, mqtt_port=port)
            files[bundle.device_path(device.id, Kind.RENEWAL)] = answer.model_dump_json().encode()
    return files


def _receipt(device: str, state: StreamState, now: datetime) -> Receipt:
    return Receipt(
        device=device,
        sent_at=int(now.timestamp() * 1000),
        stream=Stream(state.stream),
        epoch=state.epoch,
        up_to=state.up_to,
        hash=state.hash,
    )
