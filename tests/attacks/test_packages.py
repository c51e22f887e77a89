"""Attacks through model packages: by a mirror, by whoever can write to the disk, and by a hostile publisher.

What release signers sign together is trusted to be a model; it is still not trusted to name files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets

from garrison_controller.signing.packing import pack, sources_from_options
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import PackageRef
from tests.attacks import standing
from tests.attacks.target import RegistryWork, Target
from tests.fakes.ceremony import NOW, draft
from tests.fakes.memory_source import MemorySource
from tests.fakes.packages import Package, make_package, noise
from tests.fakes.tuf_repository import in_days
from tests.unit.loop.rig import entry, package

BIG = make_package("chat", "2.0", files={"model.gguf": noise(50_000)}, chunk_size=4096)


def mirror(board: Target) -> MemorySource:
    """Return who serves the bytes; its fields are its faults."""
    assert isinstance(board.work, RegistryWork)
    assert isinstance(board.work.source, MemorySource)
    return board.work.source


def blob_path(board: Target, made: Package) -> Path:
    digest = made.variant.files[0].sha256
    return board.folder / "state/blobs/sha256" / digest[:2] / digest


# --- a malicious mirror ----------------------------------------------------------------------------------------------


def test_a_mirror_that_changes_a_model_file(board: Target) -> None:
    """Malicious mirror: one byte of a model file is changed on its way."""
    board.work.publish(BIG)
    blobs, digest = board.repository.content.blobs, BIG.variant.files[0].sha256
    blobs[digest] = blobs[digest][:30_000] + bytes([blobs[digest][30_000] ^ 1]) + blobs[digest][30_001:]
    with board.refusing_package("download.digest_mismatch"):
        board.desire(entry(BIG.ref, "r2"))


def test_a_mirror_that_changes_the_chunk_list(board: Target) -> None:
    """Malicious mirror: another chunk list, which would make another file look right chunk by chunk."""
    board.work.publish(BIG)
    blobs, digest = board.repository.content.blobs, BIG.variant.files[0].chunks_sha256
    blobs[digest] = bytes(len(blobs[digest]))
    with board.refusing_package("download.digest_mismatch"):
        board.desire(entry(BIG.ref, "r2"))


def test_a_mirror_that_never_stops_sending(board: Target) -> None:
    """Endless data: a model file goes on after its end, to fill the disk."""
    board.work.publish(BIG)
    mirror(board).endless.add(BIG.variant.files[0].sha256)
    with board.refusing_package("download.too_long"):
        board.desire(entry(BIG.ref, "r2"))
    assert mirror(board).sent[BIG.variant.files[0].sha256] < 100_000


def test_a_mirror_that_stops_in_the_middle(board: Target) -> None:
    """Truncation: every download ends too early; what has arrived is kept, and nothing is installed."""
    board.work.publish(BIG)
    digest = BIG.variant.files[0].sha256
    board.repository.content.blobs[digest] = board.repository.content.blobs[digest][:20_000]
    before = board.served, board.models.running
    board.desire(entry(BIG.ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "download.interrupted")
    assert not blob_path(board, BIG).exists()
    assert (board.served, board.models.running) == before


def test_a_mirror_that_changes_the_manifest(board: Target) -> None:
    """Extraneous dependencies: the mirror serves a manifest of the signed length that names another file."""
    board.work.publish(BIG)
    targets = board.repository.content.targets
    for digest, path in list(targets):
        if path == BIG.path:
            targets[(digest, path)] = BIG.manifest_bytes.replace(b"model.gguf", b"extra.gguf")
    before = board.served, board.models.running
    board.desire(entry(BIG.ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "registry.damaged")
    assert board.headers("metadata.refused")[-1]["code"] == "registry.damaged"
    assert not (board.folder / "state/models/chat/2.0").exists()
    assert (board.served, board.models.running) == before


# --- a hostile publisher ---------------------------------------------------------------------------------------------


def hostile(change: Callable[[dict[str, Any]], None]) -> tuple[PackageRef, bytes]:
    """Return a package whose signed manifest is changed in a way that no honest tool writes."""
    document = json.loads(BIG.manifest_bytes)
    change(document)
    data = json.dumps(document).encode()
    return PackageRef(name="chat", version="2.0", manifest_sha256=sha256_hex(data)), data


def set_path(path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["variants"][0]["files"][0]["path"] = path

    return change


def set_digest(field: str, digest: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["variants"][0]["files"][0][field] = digest

    return change


def repeat(*where: str | int) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in where:
            place = place[step]
        place.append(place[0])

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_path("../../../../etc/cron.d/job"),
        set_path("/etc/passwd"),
        set_path("a/../../b"),
        set_path("./model.gguf"),
        set_path("model.gguf\n"),
        set_path("..\\..\\model.gguf"),
        set_path(""),
        set_digest("sha256", "../../../../tmp/" + "0" * 48),
        set_digest("chunks_sha256", "/" + "0" * 63),
        set_digest("sha256", "A" * 64),
    ],
    ids=["up", "absolute", "inside", "dot", "newline", "backslash", "empty", "digest", "chunks", "case"],
)
def test_path_traversal_in_a_signed_manifest(board: Target, change: Callable[[dict[str, Any]], None]) -> None:
    """Path traversal: a signed manifest names files or digests outside of the package's folder."""
    ref, data = hostile(change)
    board.repository.targets[BIG.path] = data
    board.repository.publish()
    with board.refusing_package("manifest.malformed"):
        board.desire(entry(ref, "r2"))


@pytest.mark.parametrize(
    "change",
    [repeat("variants", 0, "files"), repeat("variants")],
    ids=["files", "variants"],
)
def test_duplicate_names_in_a_signed_manifest(board: Target, change: Callable[[dict[str, Any]], None]) -> None:
    """Duplicate names: a signed manifest has two files, or two variants, of one name, of which readers take either."""
    ref, data = hostile(change)
    board.repository.targets[BIG.path] = data
    board.repository.publish()
    with board.refusing_package("manifest.malformed"):
        board.desire(entry(ref, "r2"))


@pytest.mark.parametrize("digest", ["/dev/zero", "../../identity/identity.key", "\x00", "0" * 63])
def test_a_digest_that_is_a_path(board: Target, digest: str) -> None:
    """Path traversal: signed metadata gives, as a manifest's SHA-256, the name of another, perhaps endless, file."""
    repository = board.repository
    repository.add(BIG)
    repository.publish()
    metadata = Metadata[Targets].from_bytes(board.content["4.targets.json"])
    metadata.signed.targets[BIG.path].hashes["sha256"] = digest
    metadata.signatures.clear()
    for signer in repository.signers["targets"]:
        metadata.sign(signer, append=True)
    board.content["4.targets.json"] = metadata.to_bytes()
    snapshot = Snapshot(version=4, expires=in_days(30))
    snapshot.meta["targets.json"] = MetaFile.from_data(4, metadata.to_bytes(), ["sha256"])
    repository.snapshot(snapshot)
    before = board.served, board.models.running
    board.desire(entry(BIG.ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "registry.damaged")
    assert board.headers("metadata.refused")[-1]["code"] == "registry.damaged"
    assert (board.served, board.models.running) == before


def test_one_package_under_the_name_of_another(board: Target) -> None:
    """Name confusion: the manifest of another model is signed under this model's path."""
    other = make_package("other", "9.9")
    board.repository.targets[BIG.path] = other.manifest_bytes
    board.repository.publish()
    ref = PackageRef(name="chat", version="2.0", manifest_sha256=sha256_hex(other.manifest_bytes))
    with board.refusing_package("registry.manifest_mismatch"):
        board.desire(entry(ref, "r2"))


def test_a_manifest_larger_than_any_board_reads(board: Target) -> None:
    """Endless data: release signers are made to sign a manifest of many megabytes."""
    ref, data = hostile(lambda document: document.update(license_description="x" * 2_000_000))
    board.repository.targets[BIG.path] = data
    board.repository.publish()
    before = board.served, board.models.running
    board.desire(entry(ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "registry.damaged")
    assert f"target {BIG.path}" not in mirror(board).log
    assert (board.served, board.models.running) == before


# --- someone who can write to the disk -------------------------------------------------------------------------------


def test_a_planted_link_where_a_download_will_be_written(board: Target, tmp_path: Path) -> None:
    """Symbolic link: a link to a system file waits where the download's part will be written."""
    board.work.publish(BIG)
    victim = tmp_path / "passwd"
    victim.write_bytes(b"root:x:0:0")
    part = blob_path(board, BIG).with_name(blob_path(board, BIG).name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.symlink_to(victim)
    before = board.served, board.models.running
    board.desire(entry(BIG.ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "disk.failed")
    assert victim.read_bytes() == b"root:x:0:0"
    assert (board.served, board.models.running) == before


def test_a_planted_link_in_place_of_a_chunk_list(board: Target, tmp_path: Path) -> None:
    """Symbolic link: a link to a system file waits where the chunk list will be kept; it is replaced, not followed."""
    board.work.publish(BIG)
    victim = tmp_path / "passwd"
    victim.write_bytes(b"root:x:0:0")
    chunks = blob_path(board, BIG).with_name(blob_path(board, BIG).name + ".chunks")
    chunks.parent.mkdir(parents=True, exist_ok=True)
    chunks.symlink_to(victim)
    board.deploy(BIG, "r2")
    assert victim.read_bytes() == b"root:x:0:0"
    assert not chunks.is_symlink()
    assert board.models.running == ["chat:2.0"]


def test_a_part_prepared_with_other_bytes(board: Target) -> None:
    """Poisoned resume: a part of a download is replaced by other bytes before it is resumed."""
    part = blob_path(board, BIG).with_name(blob_path(board, BIG).name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(noise(50_000, seed=99))
    board.deploy(BIG, "r2")
    assert board.models.running == ["chat:2.0"]
    assert sha256_hex(blob_path(board, BIG).read_bytes()) == BIG.variant.files[0].sha256


# --- at the publisher ------------------------------------------------------------------------------------------------


def refused(code: str, act: Callable[[], object], folder: Path) -> None:
    """Assert that ``act`` is refused so and leaves ``folder`` as it was."""
    before = standing.files(folder)
    with pytest.raises(GarrisonError) as caught:
        act()
    assert caught.value.code == code
    assert standing.files(folder) == before


@pytest.mark.parametrize("path", ["../model.gguf", "/etc/model.gguf", "a/../../b", "..\\model.gguf"])
def test_packing_a_path_outside_of_the_package(tmp_path: Path, path: str) -> None:
    """Path traversal at the publisher: a draft from elsewhere names a file outside of the package."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    document = json.loads(draft())
    document["variants"][0]["files"][0]["path"] = path
    text = json.dumps(document).encode()
    refused("manifest.malformed", lambda: pack(text, {path: model}, tmp_path / "out", NOW), tmp_path)


def test_packing_two_files_of_one_name(tmp_path: Path) -> None:
    """Duplicate names at the publisher: a draft names one path twice."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    document = json.loads(draft())
    document["variants"][0]["files"] *= 2
    text = json.dumps(document).encode()
    refused("manifest.malformed", lambda: pack(text, {"model.gguf": model}, tmp_path / "out", NOW), tmp_path)


def test_naming_one_source_twice(tmp_path: Path) -> None:
    """Duplicate names at the publisher: --file gives one name two sources, of which either might be packed."""
    refused("package.file_option", lambda: sources_from_options(["model.gguf=a", "model.gguf=b"]), tmp_path)


@pytest.mark.parametrize("kind", ["folder", "device", "pipe"])
def test_packing_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """Symbolic link at the publisher: a source leads to a folder, an endless device, or a pipe that never ends."""
    source = tmp_path / "model.gguf"
    if kind == "pipe":
        os.mkfifo(source)
    else:
        source.symlink_to("/dev/zero" if kind == "device" else tmp_path)
    refused("package.file_missing", lambda: pack(draft(), {"model.gguf": source}, tmp_path / "out", NOW), tmp_path)


def test_a_draft_that_asks_for_endless_chunks(tmp_path: Path) -> None:
    """Exhaustion at the publisher: a draft from elsewhere asks for chunks larger than any memory."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    document = json.loads(draft())
    document["variants"][0]["files"][0]["chunk_size"] = 10**15
    text = json.dumps(document).encode()
    refused("package.draft_malformed", lambda: pack(text, {"model.gguf": model}, tmp_path / "out", NOW), tmp_path)


def test_a_deeply_nested_draft(tmp_path: Path) -> None:
    """Deeply nested JSON: a draft from elsewhere is a hundred thousand brackets."""
    refused("package.draft_malformed", lambda: pack(b"[" * 100_000, {}, tmp_path / "out", NOW), tmp_path)


def test_a_model_that_is_packed_while_it_changes(board: Target) -> None:
    """Substitution: what is served under a signed digest is another version's file."""
    board.work.publish(package("3.0"))
    blobs = board.repository.content.blobs
    blobs[package("3.0").variant.files[0].sha256] = blobs[package("1.0").variant.files[0].sha256]
    with board.refusing_package("download.digest_mismatch"):
        board.desire(entry(package("3.0").ref, "r2"))
