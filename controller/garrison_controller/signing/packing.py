"""Model packages on a publisher's disk: a folder with ``manifest.json`` and ``blobs/<sha256>``.

A draft is a manifest whose files carry only ``path``; packing fills in sizes, digests, and chunk lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from garrison_controller.signing.provenance import check_signature, sign_off
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.manifest import (
    CHUNK_SIZE,
    MAX_MANIFEST_BYTES,
    Manifest,
    ModelFile,
    pack_chunks,
    parse_manifest,
    unpack_chunks,
)

MAX_CHUNK_SIZE = 64 * 1024 * 1024
"""As in ``ModelFile``; checked before a chunk of that size is read."""


@dataclass(frozen=True)
class PackedBlob:
    """One blob of a package: ``label`` says what it is, for progress and errors."""

    sha256: str
    size: int
    path: Path
    label: str


@dataclass(frozen=True)
class Package:
    """A checked package folder."""

    folder: Path
    manifest: Manifest
    manifest_bytes: bytes
    blobs: tuple[PackedBlob, ...]

    @property
    def manifest_sha256(self) -> str:
        """SHA-256 of the manifest's exact bytes."""
        return sha256_hex(self.manifest_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs together."""
        return sum(blob.size for blob in self.blobs)


@dataclass(frozen=True)
class MakersSignature:
    """A model-signing bundle and the public key (PEM) that it shall verify with."""

    bundle: bytes
    public_key_pem: str


def pack(
    draft: bytes, files: Mapping[str, Path], out: Path, now: datetime, signature: MakersSignature | None = None
) -> Package:
    """Write the package that ``draft`` describes to the new folder ``out`` and return it.

    ``files`` maps a file's path in the package to a file on disk; ``<variant>:<path>`` names it for one variant only.
    ``created_at`` becomes ``now`` where the draft has none. Files are copied, since a package must not change later.
    ``signature`` must cover exactly these files; it is kept with them.

    Raises:
        RefusedError: ``provenance.bad_signature``, ``provenance.files_differ``.
        InvalidError: ``package.draft_malformed``, ``package.file_unnamed`` (no source for a file),
            ``package.file_unused`` (a source that no variant names), ``manifest.malformed``.
        NotFoundError: ``package.file_missing``.
        ConflictError: ``package.exists``.
    """
    document = _parse_draft(draft)
    if out.exists():
        raise ConflictError("package.exists", f"{out} exists already", hint="remove it or choose another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    blobs = partial / "blobs"
    blobs.mkdir(parents=True)
    try:
        _fill_files(document, files, blobs)
        document.setdefault("created_at", now.strftime("%Y-%m-%dT%H:%M:%SZ"))
        if signature is not None:
            _keep_signature(document, signature, blobs)
        data = _to_bytes(document)
        _refuse_unknown_fields(document, parse_manifest(data).model_dump(mode="json"), "draft")
        (partial / "manifest.json").write_bytes(data)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_package(out)


def open_package(folder: Path) -> Package:
    """Return the package in ``folder`` after hashing every blob of it.

    Raises:
        NotFoundError: ``package.missing`` or ``package.blob_missing``.
        RefusedError: ``package.blob_changed`` if a blob's bytes are not what its name says, ``package.chunks_wrong``,
            ``package.blob_is_link``, and ``provenance.*`` if the model's maker did not sign these files.
        InvalidError: ``manifest.malformed``, ``manifest.too_large``, ``manifest.chunks_malformed``.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise NotFoundError(
            "package.missing", f"{folder} holds no manifest.json", hint="`garrison model pack` makes a package"
        )
    with path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    manifest = parse_manifest(data)
    found: dict[str, PackedBlob] = {}
    for variant in manifest.variants:
        for model_file in variant.files:
            chunk_list, whole = _blobs_of(folder, variant.name, model_file)
            if whole.sha256 not in found or chunk_list.sha256 not in found:
                _check_file(model_file, chunk_list, whole)
                found[chunk_list.sha256], found[whole.sha256] = chunk_list, whole
    stated = manifest.provenance.signature
    if stated is not None:
        bundle = PackedBlob(
            stated.bundle_sha256, stated.bundle_size, folder / "blobs" / stated.bundle_sha256, "model signature"
        )
        _refuse_missing(bundle)
        check_signature(manifest, bundle.path.read_bytes())
        found[bundle.sha256] = bundle
    return Package(folder, manifest, data, tuple(found.values()))


def _blobs_of(folder: Path, variant: str, file: ModelFile) -> tuple[PackedBlob, PackedBlob]:
    blobs, label = folder / "blobs", f"{variant}/{file.path}"
    chunk_list_size = 32 * -(-file.size // file.chunk_size)
    return (
        PackedBlob(file.chunks_sha256, chunk_list_size, blobs / file.chunks_sha256, f"{label} (chunk list)"),
        PackedBlob(file.sha256, file.size, blobs / file.sha256, label),
    )


def _check_file(file: ModelFile, chunk_list: PackedBlob, whole: PackedBlob) -> None:
    """Check both blobs of a file: a board that met a wrong chunk list could never finish its download."""
    for blob in (chunk_list, whole):
        _refuse_missing(blob)
    listed = chunk_list.path.read_bytes()
    if sha256_hex(listed) != chunk_list.sha256:
        raise _changed(chunk_list)
    size, digest, chunks = _hash(whole.path, file.chunk_size)
    if (size, digest) != (whole.size, whole.sha256):
        raise _changed(whole)
    if chunks != unpack_chunks(listed, file):
        raise RefusedError(
            "package.chunks_wrong",
            f"{chunk_list.label} does not list the chunks of the file",
            hint="pack again with `garrison model pack`",
        )


def _refuse_missing(blob: PackedBlob) -> None:
    """Refuse what is not there, and a link: what it leads to may change between this look and the upload."""
    if blob.path.is_symlink():
        raise RefusedError("package.blob_is_link", f"{blob.label}: {blob.path} is a link", hint="pack again")
    if not blob.path.is_file():
        raise NotFoundError("package.blob_missing", f"{blob.label}: {blob.path} is missing", hint="pack again")


def _changed(blob: PackedBlob) -> RefusedError:
    return RefusedError(
        "package.blob_changed",
        f"{blob.label}: {blob.path} does not hold the bytes that the manifest names",
        hint="pack again from the original files",
    )


def _hash(path: Path, chunk_size: int) -> tuple[int, str, list[bytes]]:
    whole, chunks, size = hashlib.sha256(), list[bytes](), 0
    with path.open("rb") as file:
        while chunk := file.read(chunk_size):
            whole.update(chunk)
            chunks.append(hashlib.sha256(chunk).digest())
            size += len(chunk)
    return size, whole.hexdigest(), chunks


def _parse_draft(draft: bytes) -> dict[str, object]:
    try:
        document = json.loads(draft)
    except (ValueError, RecursionError) as error:
        raise InvalidError("package.draft_malformed", f"the draft is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidError("package.draft_malformed", "the draft is no JSON object")
    provenance = document.get("provenance")
    if isinstance(provenance, dict) and "signature" in provenance:
        raise InvalidError(
            "package.draft_malformed",
            "draft.provenance.signature is not for a draft to say",
            hint="give the maker's bundle with --model-signature; it is verified and filled in",
        )
    return document


def _fill_files(document: dict[str, object], files: Mapping[str, Path], blobs: Path) -> None:
    unused = set(files)
    variants = document.get("variants")
    for variant in variants if isinstance(variants, list) else []:
        entries = variant.get("files") if isinstance(variant, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise InvalidError("package.draft_malformed", "every file of a variant needs a path")
            path = entry["path"]
            name = f"{variant.get('name')}:{path}"
            name = name if name in files else path
            source = files.get(name)
            if source is None:
                raise InvalidError(
                    "package.file_unnamed", f"no source for the file {path}", hint=f"add --file {path}=FILE"
                )
            unused.discard(name)
            chunk_size = entry.get("chunk_size", CHUNK_SIZE)
            if not isinstance(chunk_size, int) or not 4096 <= chunk_size <= MAX_CHUNK_SIZE:
                raise InvalidError(
                    "package.draft_malformed", f"{path}: chunk_size is no integer from 4096 to {MAX_CHUNK_SIZE}"
                )
            entry.update(_store_file(source, chunk_size, blobs))
    if unused:
        raise InvalidError(
            "package.file_unused",
            f"no variant names the file {min(unused)}",
            hint="--file takes a path in the package, as the draft's variants name it: --file model.gguf=FILE",
        )


def _keep_signature(document: dict[str, object], signature: MakersSignature, blobs: Path) -> None:
    """Verify ``signature`` against the files that were just hashed; put it into the manifest and among the blobs."""
    manifest = parse_manifest(_to_bytes(document))
    stated = sign_off(manifest, signature.bundle, signature.public_key_pem)
    provenance = document.setdefault("provenance", {})
    assert isinstance(provenance, dict)  # or the manifest would not have been valid
    provenance["signature"] = stated.model_dump(mode="json")
    (blobs / stated.bundle_sha256).write_bytes(signature.bundle)


def _to_bytes(document: dict[str, object]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _store_file(source: Path, chunk_size: int, blobs: Path) -> dict[str, str | int]:
    if not source.is_file():
        raise NotFoundError("package.file_missing", f"there is no file {source}", hint="name it with --file NAME=FILE")
    temporary = blobs / "incoming"
    shutil.copyfile(source, temporary)
    size, digest, chunks = _hash(temporary, chunk_size)  # the copy, not the source: what was hashed is what is kept
    temporary.rename(blobs / digest)
    chunk_list = pack_chunks(chunks)
    (blobs / sha256_hex(chunk_list)).write_bytes(chunk_list)
    return {
        "size": size,
        "sha256": digest,
        "chunk_size": chunk_size,
        "chunks_sha256": sha256_hex(chunk_list),
    }


def _refuse_unknown_fields(draft: object, known: object, where: str) -> None:
    """Refuse a field that no reader would ever see: in a draft it is a typing error."""
    if isinstance(draft, dict) and isinstance(known, dict):
        for name, value in draft.items():
            if name not in known:
                raise InvalidError(
                    "package.draft_malformed", f"{where}.{name} is no field of a manifest", hint="correct the draft"
                )
            _refuse_unknown_fields(value, known[name], f"{where}.{name}")
    elif isinstance(draft, list) and isinstance(known, list):
        for index, (value, other) in enumerate(zip(draft, known, strict=True)):
            _refuse_unknown_fields(value, other, f"{where}.{index}")


def sources_from_options(options: list[str]) -> dict[str, Path]:
    """Return what repeated ``--file NAME=PATH`` options say.

    Raises:
        InvalidError: ``package.file_option``.
    """
    sources: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not name or not equals or not path or name in sources:
            raise InvalidError(
                "package.file_option", f"--file {option}: not NAME=PATH, or named twice", hint="--file model.gguf=FILE"
            )
        sources[name] = Path(os.path.expanduser(path))
    return sources
