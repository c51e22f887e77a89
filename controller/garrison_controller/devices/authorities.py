"""Changing a certificate authority while boards go on: both are trusted for a time, then the old one is gone.

``pki/<name>.pem`` holds every authority that others are to trust. Its private keys lie beside it: ``<name>.key`` signs,
``<name>.next.key`` waits, ``<name>.old.key`` has signed and only makes its revocation list still. ``stage``,
``discard``, ``use``, and ``retire`` are for the controller's host; ``settle`` is the running controller's part, once
release signers have published a ``fleet.json`` without the old one. Each can be cut off at any point and run again.
Source: docs/operations.md, "Replacing an authority".
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from cryptography.exceptions import InvalidSignature

from garrison_controller.access.events import record_event
from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import pki, probes, queries
from garrison_controller.devices.ca import Authority, fingerprint, fingerprints, read_certificates, to_pem
from garrison_controller.devices.keyring import key_store
from garrison_controller.devices.pki import DEVICE_CA, SERVER_CA
from garrison_controller.devices.rotation import CONTROLLER, name_in_online
from garrison_controller.registry.store import RegistryStore
from garrison_controller.signing.metadata import file_name, parse_targets, sync_folder
from garrison_protocol.errors import ConflictError, GarrisonError, NotFoundError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET, Fleet, parse_fleet

TITLES = {DEVICE_CA: "Garrison device CA", SERVER_CA: "Garrison server CA"}
FIELDS = {DEVICE_CA: "device_ca", SERVER_CA: "server_ca"}
"""The authorities' names in ``fleet.json`` and ``online.json``."""
NEXT, OLD = "next", "old"
MAX_NAMED = 10


def stage(config: ControllerConfig, database: Database, name: str, now: datetime) -> Authority:
    """Return the authority that shall take the place of ``name``, made here unless it waits already.

    From then on ``<name>.pem`` and ``online.json`` have both, and the device CA's revocation lists are two: the new one
    has another subject, so that nobody takes one's list, or certificate, for the other's.

    Raises:
        ConflictError: ``ca.rotation_unfinished``.
        GarrisonError: As ``KeyStore.load``.
    """
    current = pki.load_authority(config, name)
    if find(config, name, OLD) is not None:
        raise ConflictError(
            "ca.rotation_unfinished",
            f"the {name} before the present one is not retired yet",
            hint=f"finish that first: `garrison serve retire-ca {name}`",
        )
    store = key_store(config, config.pki_dir)
    authority = find(config, name, NEXT)
    if authority is None:
        authority = Authority.create(f"{TITLES[name]} {secrets.token_hex(4)}", now)
        pki.replace_file(store.folder / f"{name}.{NEXT}.key", authority.key_pem(store.passphrase), 0o600)
        _write_trusted(config, name, current, authority)
    _write_lists(config, database, name, now)
    name_in_online(config, FIELDS[name], _trusted(config, name))
    return authority


def discard(config: ControllerConfig, database: Database, name: str, now: datetime) -> Authority:
    """Delete the authority that waits and return the one in force.

    Raises:
        ConflictError: ``key.nothing_staged``.
        GarrisonError: As ``KeyStore.load``.
    """
    current = pki.load_authority(config, name)
    path = config.pki_dir / f"{name}.{NEXT}.key"
    if not path.exists():
        raise nothing_staged(name)
    name_in_online(config, FIELDS[name], current.pem)
    _write_trusted(config, name, current)
    path.unlink()
    sync_folder(path.parent)
    _write_lists(config, database, name, now)
    return current


def use(config: ControllerConfig, database: Database, name: str, now: datetime, *, force: bool) -> Authority:
    """Let the authority that waits sign from now on, the controller's own certificates first; return it.

    A running controller goes on with what it has read until it is restarted. ``force``: also where somebody would be
    cut off.

    Raises:
        ConflictError: ``key.nothing_staged``, ``ca.not_published``; unless forced also ``ca.boards_behind``.
        RefusedError: ``ca.broker_refuses``, and UnavailableError ``ca.server_unreachable``, unless forced.
        GarrisonError: As ``KeyStore.load``.
    """
    store = key_store(config, config.pki_dir)
    staged = find(config, name, NEXT)
    if staged is None and find(config, name, OLD) is None:
        raise nothing_staged(name)
    if staged is not None:
        since = _listed_since(RegistryStore(config.metadata_dir), name, staged)
        if not force and name == SERVER_CA:
            _check_boards(database, since)
        if not force and name == DEVICE_CA:
            probes.check_broker_admits(config, staged, now)
        old = pki.load_authority(config, name).key_pem(store.passphrase)
        pki.replace_file(store.folder / f"{name}.{OLD}.key", old, 0o600)
        with database.session() as session:
            record_event(session, now, CONTROLLER, "key.switch", name)
        store.settle(name)  # last: until here a kill leaves the staged key, and all of this is done again
    device_ca, server_ca = (pki.load_authority(config, one) for one in (DEVICE_CA, SERVER_CA))
    pki.issue_own(config, device_ca, server_ca, now)
    return server_ca if name == SERVER_CA else device_ca


def retire(config: ControllerConfig, database: Database, name: str, now: datetime, *, force: bool) -> Authority:
    """Name the authority in force alone in ``online.json``, for release signers to publish; return it.

    Everything else stays until they have: see ``settle``. ``force``: also where somebody would be cut off.

    Raises:
        ConflictError: ``ca.nothing_to_retire``; unless forced also ``ca.still_needed``, ``ca.still_shown``.
        UnavailableError: ``ca.server_unreachable``, unless forced.
        GarrisonError: As ``KeyStore.load``.
    """
    current, old = pki.load_authority(config, name), find(config, name, OLD)
    if old is None or old.fingerprint == current.fingerprint:
        raise ConflictError(
            "ca.nothing_to_retire", f"there is one {name}, and it is in force", hint=f"`garrison serve use-ca {name}`"
        )
    if not force and name == DEVICE_CA:
        _check_certificates(database, old, now)
    if not force and name == SERVER_CA:
        probes.check_servers_show(config, current)
    name_in_online(config, FIELDS[name], current.pem)
    return current


def settle(config: ControllerConfig, database: Database, fleet: Fleet, now: datetime) -> list[str]:
    """Forget each old authority that ``fleet``, as published, no longer lists; return their names.

    It is no longer in ``<name>.pem``, its revocation list and its private key are gone. A running broker trusts it
    until it is restarted.
    """
    retired = []
    for name, field in FIELDS.items():
        path = config.pki_dir / f"{name}.{OLD}.key"
        if not path.exists():
            continue
        current, old = pki.load_authority(config, name), find(config, name, OLD)
        listed = fingerprints(getattr(fleet, field))
        if current.fingerprint not in listed or (old is not None and old.fingerprint in listed):
            continue
        name_in_online(config, field, current.pem)
        _write_trusted(config, name, current)
        with database.session() as session:
            record_event(session, now, CONTROLLER, "key.retire", name)
        path.unlink()
        sync_folder(path.parent)
        _write_lists(config, database, name, now)
        retired.append(name)
    return retired


def find(config: ControllerConfig, name: str, which: str) -> Authority | None:
    """Return the authority whose key is ``<name>.<which>.key``; None without key or certificate.

    Raises:
        GarrisonError: As ``KeyStore.load``.
    """
    if not (config.pki_dir / f"{name}.{which}.key").is_file():
        return None
    key = key_store(config, config.pki_dir).load(f"{name}.{which}")
    try:
        return Authority.of(key, config.pki_dir / f"{name}.pem")
    except RefusedError:
        return None  # cut off between the two files


def write_revocation_lists(config: ControllerConfig, database: Database, now: datetime) -> None:
    """Write what the broker reads, from what the database says now: a list by each device CA whose key is here.

    Raises:
        GarrisonError: As ``KeyStore.load``.
    """
    with _locked(config):  # or an older list could replace a newer one
        waiting = (find(config, DEVICE_CA, which) for which in (NEXT, OLD))
        current = pki.load_authority(config, DEVICE_CA)
        others = {one.fingerprint: one for one in waiting if one is not None}
        others.pop(current.fingerprint, None)
        with database.reading() as session:
            revoked = queries.revoked_certificates(session, now)
        pki.write_revocation_list(config.pki_dir, [current, *others.values()], revoked, now)


def in_use(config: ControllerConfig, device_ca: Authority) -> Mapping[str, Mapping[str, str]]:
    """Return ``device_ca`` and the authorities behind what a controller that starts now shows to broker and boards.

    By field of ``fleet.json``, each as PEM by fingerprint.

    Raises:
        RefusedError: ``pki.issuer_unknown``.
    """
    return {
        FIELDS[DEVICE_CA]: {device_ca.fingerprint: device_ca.pem} | _issuer(config, pki.CLIENT, DEVICE_CA),
        FIELDS[SERVER_CA]: _issuer(config, pki.SERVER, SERVER_CA),
    }


def check_fleet(fleet: Fleet, needed: Mapping[str, Mapping[str, str]]) -> None:
    """Return if ``fleet`` lists every authority that is in use, as of ``in_use``.

    Raises:
        RefusedError: ``registry.fleet_lacks_authority``.
    """
    for field, authorities in needed.items():
        if not authorities.keys() <= fingerprints(getattr(fleet, field)):
            raise RefusedError(
                "registry.fleet_lacks_authority",
                f"{field} in fleet.json lacks an authority that this controller works with: boards would be cut off",
                hint="take the controller's present online.json; after `garrison serve use-ca`, restart the controller",
            )


def nothing_staged(name: str) -> ConflictError:
    """Return what is said where no new authority waits."""
    return ConflictError("key.nothing_staged", f"no new {name} waits", hint=f"`garrison serve rotate-key {name}`")


def _issuer(config: ControllerConfig, leaf: str, name: str) -> dict[str, str]:
    certificate = read_certificates(config.pki_dir / f"{leaf}.pem")[0]
    for authority in read_certificates(config.pki_dir / f"{name}.pem"):
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return {fingerprint(authority): to_pem(authority)}
    raise RefusedError(
        "pki.issuer_unknown",
        f"pki/{leaf}.pem is not by an authority in pki/{name}.pem",
        hint="`garrison serve renew` issues it anew",
    )


def _listed_since(store: RegistryStore, name: str, authority: Authority) -> int:
    """Return from which version of targets on, up to the published one, ``fleet.json`` lists ``authority``."""
    published = store.published()
    since, version = 0, 0 if published is None else published.targets.signed.version
    while version > 0 and _lists(store, version, name, authority):
        since, version = version, version - 1
    if since == 0:
        raise ConflictError(
            "ca.not_published",
            f"the published fleet.json does not list the new {name}: boards would refuse what it signs",
            hint=f"`garrison registry key rotate {name} --online {pki.ONLINE}`, sign, push; then again",
        )
    return since


def _lists(store: RegistryStore, version: int, name: str, authority: Authority) -> bool:
    data = store.find_metadata(file_name("targets", version))
    if data is None:
        return False
    try:
        fleet = parse_fleet(store.read_target(parse_targets(data).signed.targets[FLEET_TARGET]))
    except (KeyError, GarrisonError):
        return False
    return authority.fingerprint in fingerprints(getattr(fleet, FIELDS[name]))


def _check_boards(database: Database, targets: int) -> None:
    with database.reading() as session:
        behind = queries.boards_before_targets(session, targets)
    if behind:
        raise ConflictError(
            "ca.boards_behind",
            f"{len(behind)} boards have not reported targets version {targets}, which names the new server CA, and"
            f" would be cut off: {_some(behind)}",
            hint="wait for them, or give --force: a stick brings them back (`garrison registry export --bundle`)",
            boards=len(behind),
        )


def _check_certificates(database: Database, old: Authority, now: datetime) -> None:
    with database.reading() as session:
        holders = queries.boards_certified_by(session, old.fingerprint, now)
    if holders:
        last = max(holders.values())
        raise ConflictError(
            "ca.still_needed",
            f"{len(holders)} boards have a certificate by the old device CA, the last until {last:%Y-%m-%d %H:%M}:"
            f" {_some(list(holders))}",
            hint="boards renew by themselves; wait, or give --force if somebody may have the old authority's key",
            boards=len(holders),
        )


def _some(boards: list[str]) -> str:
    return ", ".join(boards[:MAX_NAMED]) + (", ..." if len(boards) > MAX_NAMED else "")


def _trusted(config: ControllerConfig, name: str) -> str:
    return (config.pki_dir / f"{name}.pem").read_text(encoding="utf-8")


def _write_trusted(config: ControllerConfig, name: str, *authorities: Authority) -> None:
    pems = "".join(authority.pem for authority in authorities)
    pki.replace_file(config.pki_dir / f"{name}.pem", pems.encode(), 0o644)


def _write_lists(config: ControllerConfig, database: Database, name: str, now: datetime) -> None:
    if name == DEVICE_CA:
        write_revocation_lists(config, database, now)


@contextmanager
def _locked(config: ControllerConfig) -> Iterator[None]:
    """Hold the folder of certificates against threads and processes alike."""
    try:
        descriptor = os.open(config.pki_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise NotFoundError(
            "controller.not_initialised", f"{config.pki_dir} cannot be read: {error.strerror}"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
