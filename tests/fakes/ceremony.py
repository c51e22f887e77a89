"""A small fleet's signers, their keys, and a workspace, for tests: real keys and real metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner

from garrison_controller.signing.keys import generate_key, load_public, load_signer
from garrison_controller.signing.online import OnlineKeys
from garrison_controller.signing.packing import Package, pack
from garrison_controller.signing.workspace import RoleKeys, Workspace
from garrison_protocol.keys import SigningKey

NOW = datetime.now(UTC).replace(microsecond=0)
PASSPHRASE = "correct horse battery"
ROOT_SIGNERS = ("alice", "bob", "carol")
RELEASE_SIGNERS = ("dan", "erin")
ONLINE = ("snapshot", "timestamp", "director", "receipt", "log")


@dataclass(frozen=True)
class Ceremony:
    """Keys in ``folder/keys``, the controller's keys in ``folder/online``, the workspace in ``folder/release``."""

    folder: Path
    online: OnlineKeys
    signers: dict[str, CryptoSigner]
    workspace: Workspace

    def sign(self, *names: str) -> None:
        """Let these people sign everything that waits for them."""
        for name in names:
            self.workspace.sign(self.signers[name])


def make_online(folder: Path) -> OnlineKeys:
    """Create the controller's keys in ``folder`` and return their public halves."""
    folder.mkdir()
    public = {}
    for purpose in ONLINE:
        key = SigningKey.generate()
        key.save(folder / f"{purpose}.key")
        public[purpose] = key.public_hex
    return OnlineKeys(**public, device_ca="device authority\n", server_ca="server authority\n")


def make_signer(folder: Path, name: str) -> CryptoSigner:
    """Create a signer's key files in ``folder``."""
    return load_signer(generate_key(name, folder, PASSPHRASE).private_path, PASSPHRASE)


def make_ceremony(folder: Path, now: datetime = NOW) -> Ceremony:
    """Return a workspace with root 1 (2 of 3) and targets 1 (2 of 2), both unsigned."""
    keys = folder / "keys"
    signers = {name: make_signer(keys, name) for name in (*ROOT_SIGNERS, *RELEASE_SIGNERS)}
    online = make_online(folder / "online")
    workspace = Workspace.create(
        folder / "release",
        online=online,
        fleet="demo",
        root=RoleKeys("root", tuple(load_public(keys / f"{name}.pub.json") for name in ROOT_SIGNERS), 2),
        targets=RoleKeys("targets", tuple(load_public(keys / f"{name}.pub.json") for name in RELEASE_SIGNERS), 2),
        root_days=730,
        targets_days=365,
        online_days=1095,
        now=now,
    )
    return Ceremony(folder, online, signers, workspace)


def draft(name: str = "tiny", version: str = "1.0.0", **changes: object) -> bytes:
    """Return a draft manifest with one variant, ``q4``, of one file, ``model.gguf``."""
    document: dict[str, object] = {
        "name": name,
        "version": version,
        "alias": "chat",
        "display_name": "Tiny",
        "publisher": "test",
        "license": "Apache-2.0",
        "task": "chat-completion",
        "variants": [
            {
                "name": "q4",
                "runtime": {"engine": "llama.cpp"},
                "memory_mb": 100,
                "files": [{"path": "model.gguf", "chunk_size": 4096}],
            }
        ],
        "evaluation": {
            "cases": [{"kind": "choice", "id": "one", "prompt": "1+1=", "choices": ["2", "7"], "expected": 0}],
            "min_accuracy": 0.5,
        },
    }
    return json.dumps({**document, **changes}).encode()


def make_package(
    folder: Path, name: str = "tiny", version: str = "1.0.0", *, content: bytes = b"", now: datetime = NOW
) -> Package:
    """Pack a model whose file holds ``content``, or else bytes made of name and version."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{name}-{version}.gguf"
    source.write_bytes(content or f"{name} {version} ".encode() * 1000)
    return pack(draft(name, version), {"model.gguf": source}, folder / f"{name}-{version}", now)


def later(**amount: int) -> datetime:
    """Return ``NOW`` plus days, hours, ..."""
    return NOW + timedelta(**amount)
