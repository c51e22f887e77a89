"""A model folder that its maker signed with the real model-signing 1.1.1, and bundles as a forger would make them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from garrison_controller.signing.packing import MakersSignature
from garrison_protocol.envelope import pae
from tests.fakes.ceremony import draft

CURVES = ("prime256v1", "secp384r1", "secp521r1")
FILES = {
    "model.gguf": b"GGUF a tiny model, signed by its maker\n" * 100,
    "LICENSE": b"Apache-2.0\n",
    "tokenizer/vocab.txt": b"hello\nworld\n",
}
"""Exactly what was signed."""
_VECTORS = Path(__file__).parent / "model_signing"


def makers_signature(curve: str = "prime256v1") -> MakersSignature:
    """Return what ``model_signing sign key`` wrote for ``FILES``, and the key it verifies with."""
    return MakersSignature((_VECTORS / f"{curve}.sig.json").read_bytes(), (_VECTORS / f"{curve}.pem").read_text())


def write_files(folder: Path, contents: dict[str, bytes] = FILES) -> dict[str, Path]:
    """Write ``contents`` below ``folder``, for packing."""
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


def draft_of(*names: str, name: str = "tiny") -> bytes:
    """Return a draft with one variant of these files."""
    files = [{"path": one, "chunk_size": 4096} for one in names]
    variant = {"name": "q4", "runtime": {"engine": "llama.cpp"}, "memory_mb": 100, "files": files}
    return draft(name, variants=[variant])


class Maker:
    """Somebody with a key of their own, who may state anything."""

    def __init__(self, curve: ec.EllipticCurve | None = None) -> None:
        self._key = ec.generate_private_key(curve or ec.SECP256R1())
        self.pem = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(
        self, files: dict[str, bytes] = FILES, change: Callable[[dict[str, Any]], object] = lambda _: None
    ) -> MakersSignature:
        """Return a signature over ``files``, its statement first altered by ``change``."""
        listed = [
            {"name": name, "algorithm": "sha256", "digest": hashlib.sha256(data).hexdigest()}
            for name, data in sorted(files.items())
        ]
        whole = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in listed)).hexdigest()
        statement: dict[str, Any] = {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": "model", "digest": {"sha256": whole}}],
            "predicateType": "https://model_signing/signature/v1.0",
            "predicate": {
                "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
                "resources": listed,
            },
        }
        change(statement)
        payload, kind = json.dumps(statement).encode(), "application/vnd.in-toto+json"
        sig = self._key.sign(pae(kind, payload), ec.ECDSA(hashes.SHA256()))
        envelope = {
            "payloadType": kind,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"sig": base64.b64encode(sig).decode(), "keyid": ""}],
        }
        bundle = {"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": envelope}
        return MakersSignature(json.dumps(bundle).encode(), self.pem.decode())
