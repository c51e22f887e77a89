"""What it costs a board to learn of new models: all of them in one list, or by family with signers of their own.

The board's own verifier process fetches and verifies real metadata, signed as the ceremony and the controller sign it
(targets and families by two keys), through a source that counts bytes. No network is in the figures.
"""

from __future__ import annotations

import resource
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from bench.result import Findings, Measure
from garrison_agent.registry.trust import Refresh
from garrison_agent.registry.verifier import ROOT_FILE, TrustVerifier
from garrison_protocol.errors import NotFoundError
from garrison_protocol.fleet import FLEET_TARGET, Fleet
from garrison_protocol.manifest import target_path

MODELS = (10, 1000)
FAMILIES = 10
ROUNDS = 9
_COMPACT = JSONSerializer(compact=True)
_START = datetime(2026, 1, 1, tzinfo=UTC)
_WANTED = target_path("family0-model0", "1.0.0")


def measure(folder: Path) -> Findings:
    """Return bytes and seconds, by family beside flat; takes about a minute.

    Raises:
        GarrisonError: The verifier process failed.
    """
    lines: list[Measure] = []
    for models in MODELS:
        flat, by_family = (_Side(folder / f"{kind}-{models}", models, kind == "family") for kind in ("flat", "family"))
        for number in range(ROUNDS + 1):
            for side in (flat, by_family) if number % 2 else (by_family, flat):
                side.round(keep=number > 0)
        for what, unit, pick in _FIGURES:
            lines.append(_line(f"{what}, {models} models", unit, pick(by_family), pick(flat)))
    return Findings(
        f"one board that runs one model, out of {' or '.join(map(str, MODELS))} in {FAMILIES} families, median of"
        f" {ROUNDS} rounds in turn. Seconds are CPU time of a whole verifier process, its start included; bytes are"
        " all metadata and targets that it asked for. First: an empty cache. Then somebody publishes one more model:"
        " in a family that this board does not run, or in its own. Offline: the kept state verified anew",
        tuple(lines),
    )


@dataclass(frozen=True)
class _Cost:
    first_bytes: int
    first_s: float
    other_bytes: int
    other_s: float
    own_bytes: int
    own_s: float
    offline_s: float


_FIGURES: tuple[tuple[str, str, Callable[[_Side], list[float]]], ...] = (
    ("first refresh", "kB", lambda side: [one.first_bytes / 1e3 for one in side.costs]),
    ("first refresh", "s of CPU", lambda side: [one.first_s for one in side.costs]),
    ("after a release elsewhere", "kB", lambda side: [one.other_bytes / 1e3 for one in side.costs]),
    ("after a release elsewhere", "s of CPU", lambda side: [one.other_s for one in side.costs]),
    ("after a release of its own", "kB", lambda side: [one.own_bytes / 1e3 for one in side.costs]),
    ("after a release of its own", "s of CPU", lambda side: [one.own_s for one in side.costs]),
    ("offline", "s of CPU", lambda side: [one.offline_s for one in side.costs]),
)


class _Side:
    """One registry and one board of it."""

    def __init__(self, folder: Path, models: int, delegated: bool) -> None:
        self.costs: list[_Cost] = []
        self._board = folder
        self._registry = _Registry(models, delegated)
        self._releases = 0

    def round(self, *, keep: bool) -> None:
        """Let a board start from nothing and see two releases; ``keep`` the cost."""
        shutil.rmtree(self._board, ignore_errors=True)
        self._board.mkdir(parents=True)
        (self._board / ROOT_FILE).write_bytes(self._registry.metadata_files["1.root.json"])
        marks: dict[str, int] = {}
        first_s, first_bytes, view = self._refresh(marks)
        self._release(FAMILIES - 1)
        other_s, other_bytes, view = self._refresh(view.high_water)
        self._release(0)
        own_s, own_bytes, view = self._refresh(view.high_water)
        began_s = _cpu_s()
        offline = TrustVerifier(self._board, "").offline(view.high_water, view.refreshed_at, [_WANTED])
        offline_s = _cpu_s() - began_s
        assert offline == view
        assert list(view.manifests) == [_WANTED]
        if keep:
            self.costs.append(_Cost(first_bytes, first_s, other_bytes, other_s, own_bytes, own_s, offline_s))

    def _refresh(self, marks: dict[str, int]) -> tuple[float, int, Refresh]:
        self._registry.sent = 0
        began_s = _cpu_s()
        view = TrustVerifier(self._board, "").refresh(marks, _START, [_WANTED], self._registry)
        return _cpu_s() - began_s, self._registry.sent, view

    def _release(self, family: int) -> None:
        self._releases += 1
        self._registry.release(family, f"release{self._releases}")


class _Registry:
    """A signed registry in memory, and the source that a board reads it through; ``sent`` counts bytes."""

    def __init__(self, models: int, delegated: bool) -> None:
        self.metadata_files: dict[str, bytes] = {}
        self.sent = 0
        self._small: dict[tuple[str, str], bytes] = {}
        self._end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
        self._keys = {role: _keys(2) for role in ("root", "targets")} | {
            role: _keys(1) for role in ("snapshot", "timestamp")
        }
        self._top = Targets(expires=self._end)
        self._meta: dict[str, MetaFile] = {}
        self._online = 0
        self._families: dict[str, tuple[Targets, list[CryptoSigner]]] = {}
        if delegated:
            self._delegate()
        fleet = Fleet(name="bench", keys=(), device_ca="", server_ca="")
        self._name(self._top, FLEET_TARGET, fleet.model_dump_json().encode())
        for number in range(models):
            family = number % FAMILIES
            self._add(family, f"family{family}-model{number // FAMILIES}")
        root = Root(expires=self._end, consistent_snapshot=True)
        for role, signers in self._keys.items():
            for signer in signers:
                root.add_key(signer.public_key, role)
            root.roles[role].threshold = len(signers)
        self._sign("root", Metadata(root), self._keys["root"])
        self._publish("targets", *self._families)

    def release(self, family: int, name: str) -> None:
        """Publish one more model."""
        role = self._add(family, f"family{family}-{name}")
        changed = self._top if role == "targets" else self._families[role][0]
        changed.version += 1
        self._publish(role)

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``MetadataSource``."""
        return self._send(self.metadata_files.get(name), name, max_bytes)

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``MetadataSource``."""
        return self._send(self._small.get((sha256, path)), path, max_bytes)

    def _send(self, data: bytes | None, name: str, max_bytes: int) -> bytes:
        if data is None:
            raise NotFoundError("source.not_found", f"no {name}")
        assert len(data) <= max_bytes
        self.sent += len(data)
        return data

    def _delegate(self) -> None:
        keys, roles = {}, {}
        for number in range(FAMILIES):
            role, signers = f"family-{number}", _keys(2)
            self._families[role] = (Targets(expires=self._end), signers)
            keys.update({signer.public_key.keyid: signer.public_key for signer in signers})
            paths = [f"models/family{number}-*/*/manifest.json"]
            roles[role] = DelegatedRole(
                role, [one.public_key.keyid for one in signers], 2, terminating=True, paths=paths
            )
        self._top.delegations = Delegations(dict(keys), roles)

    def _add(self, family: int, model: str) -> str:
        role = f"family-{family}" if self._families else "targets"
        targets = self._families[role][0] if self._families else self._top
        path = target_path(model, "1.0.0")
        self._name(targets, path, f'{{"name": "{model}"}}'.ljust(2000).encode())
        return role

    def _name(self, targets: Targets, path: str, data: bytes) -> None:
        targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        self._small[targets.targets[path].hashes["sha256"], path] = data

    def _publish(self, *roles: str) -> None:
        for role in roles:
            targets, signers = self._families[role] if role != "targets" else (self._top, self._keys["targets"])
            data = self._sign(role, Metadata(targets), signers)
            self._meta[f"{role}.json"] = MetaFile.from_data(targets.version, data, ["sha256"])
        self._online += 1
        snapshot = Snapshot(version=self._online, expires=self._end, meta=self._meta)
        data = self._sign("snapshot", Metadata(snapshot), self._keys["snapshot"])
        stamp = Timestamp(version=self._online, expires=self._end)
        stamp.snapshot_meta = MetaFile.from_data(self._online, data, ["sha256"])
        self.metadata_files["timestamp.json"] = self._sign("timestamp", Metadata(stamp), self._keys["timestamp"])

    def _sign(
        self,
        role: str,
        metadata: Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp],
        signers: Sequence[CryptoSigner],
    ) -> bytes:
        for signer in signers:
            metadata.sign(signer, append=True)
        data = metadata.to_bytes(_COMPACT)
        self.metadata_files[f"{metadata.signed.version}.{role}.json"] = data
        return data


def _cpu_s() -> float:
    """Return what the processes that this one has started and ended have cost."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _keys(number: int) -> list[CryptoSigner]:
    return [CryptoSigner.generate_ed25519() for _ in range(number)]


def _line(what: str, unit: str, ours: list[float], theirs: list[float]) -> Measure:
    ratios = tuple(one / other for one, other in zip(ours, theirs, strict=True))
    return Measure(
        what, statistics.median(ours), unit, statistics.median(theirs), "flat", statistics.median(ratios), None, ratios
    )
