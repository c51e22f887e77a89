"""Model packages made of any bytes, for tests of the way they travel."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from garrison_protocol.canonical import sha256_hex
from garrison_protocol.manifest import (
    CHUNK_SIZE,
    ChoiceCase,
    Evaluation,
    Manifest,
    ModelFile,
    PackageRef,
    RuntimeSpec,
    Variant,
    pack_chunks,
    target_path,
)
from garrison_protocol.states import Engine


@dataclass(frozen=True)
class Package:
    """A manifest and every blob it names, chunk lists included, by digest."""

    manifest: Manifest
    blobs: dict[str, bytes]

    @property
    def manifest_bytes(self) -> bytes:
        """The exact bytes of the target."""
        return self.manifest.model_dump_json().encode()

    @property
    def path(self) -> str:
        """The TUF target path."""
        return target_path(self.manifest.name, self.manifest.version)

    @property
    def ref(self) -> PackageRef:
        """What desired state names."""
        return PackageRef(
            name=self.manifest.name, version=self.manifest.version, manifest_sha256=sha256_hex(self.manifest_bytes)
        )

    @property
    def variant(self) -> Variant:
        """The first variant."""
        return self.manifest.variants[0]


def noise(size: int, seed: int = 1) -> bytes:
    """Return the same ``size`` bytes for the same seed, no two chunks of them equal."""
    return random.Random(seed).randbytes(size)


def model_file(path: str, data: bytes, chunk_size: int = CHUNK_SIZE) -> tuple[ModelFile, dict[str, bytes]]:
    """Return the manifest's entry for a file and the two blobs behind it."""
    chunks = pack_chunks(
        [hashlib.sha256(data[at : at + chunk_size]).digest() for at in range(0, len(data), chunk_size)]
    )
    file = ModelFile(
        path=path, size=len(data), sha256=sha256_hex(data), chunk_size=chunk_size, chunks_sha256=sha256_hex(chunks)
    )
    return file, {file.sha256: data, file.chunks_sha256: chunks}


def make_package(
    name: str = "tiny",
    version: str = "1.0.0",
    *,
    files: dict[str, bytes] | None = None,
    chunk_size: int = CHUNK_SIZE,
    engine: Engine = Engine.LLAMA_CPP,
) -> Package:
    """Return a valid package whose single variant has ``files`` (content by path)."""
    made = [
        model_file(path, data, chunk_size)
        for path, data in (files or {"model.gguf": noise(100_000, seed=len(name))}).items()
    ]
    manifest = Manifest(
        name=name,
        version=version,
        alias=name,
        display_name=name.title(),
        publisher="tests",
        license="Apache-2.0",
        task="chat-completion",
        created_at="2026-01-01T00:00:00Z",
        variants=(
            Variant(
                name="cpu", runtime=RuntimeSpec(engine=engine), files=tuple(file for file, _ in made), memory_mb=64
            ),
        ),
        evaluation=Evaluation(
            cases=(ChoiceCase(id="one", prompt="The sky is", choices=(" blue", " loud"), expected=0),), min_accuracy=1
        ),
    )
    blobs: dict[str, bytes] = {}
    for _, pair in made:
        blobs |= pair
    return Package(manifest, blobs)
