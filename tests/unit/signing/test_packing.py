from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from garrison_controller.signing.packing import open_package, pack, sources_from_options
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, GarrisonError
from garrison_protocol.manifest import unpack_chunks
from tests.fakes.ceremony import NOW, draft, make_package


def test_packing_fills_in_sizes_digests_and_chunks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40  # two and a half chunks of 4096
    package = make_package(tmp_path, content=content)

    (file,) = package.manifest.variants[0].files
    assert (file.size, file.sha256) == (len(content), sha256_hex(content))
    chunk_list = (package.folder / "blobs" / file.chunks_sha256).read_bytes()
    expected = [hashlib.sha256(content[at : at + 4096]).digest() for at in range(0, len(content), 4096)]
    assert unpack_chunks(chunk_list, file) == expected
    assert (package.folder / "blobs" / file.sha256).read_bytes() == content
    assert package.manifest.created_at == NOW.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert package.manifest_sha256 == sha256_hex((package.folder / "manifest.json").read_bytes())
    assert {blob.sha256 for blob in package.blobs} == {file.sha256, file.chunks_sha256}


def test_an_empty_file_packs(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    package = pack(draft(), {"model.gguf": empty}, tmp_path / "out", NOW)

    assert package.manifest.variants[0].files[0].size == 0


@pytest.mark.parametrize(
    ("document", "files", "code"),
    [
        (b"{", {"model.gguf"}, "package.draft_malformed"),
        (b"[]", {"model.gguf"}, "package.draft_malformed"),
        (draft(licence="MIT"), {"model.gguf"}, "package.draft_malformed"),
        (draft(variants=[{"name": "q4", "files": [{}]}]), {"model.gguf"}, "package.draft_malformed"),
        (draft(), {"other.gguf"}, "package.file_unnamed"),
        (draft(), {"model.gguf", "other.gguf"}, "package.file_unused"),
        (draft(version="one"), {"model.gguf"}, "manifest.malformed"),
    ],
)
def test_bad_drafts_are_refused_and_leave_nothing(tmp_path: Path, document: bytes, files: set[str], code: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")

    with pytest.raises(GarrisonError) as caught:
        pack(document, dict.fromkeys(files, source), tmp_path / "out", NOW)
    assert caught.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(GarrisonError, match=r"package.file_missing.*nowhere"):
        pack(draft(), {"model.gguf": tmp_path / "nowhere"}, tmp_path / "out", NOW)


def test_a_package_is_never_overwritten(tmp_path: Path) -> None:
    make_package(tmp_path)
    with pytest.raises(ConflictError):
        make_package(tmp_path)


def test_a_changed_blob_is_noticed(tmp_path: Path) -> None:
    package = make_package(tmp_path)
    path = package.blobs[1].path
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)

    with pytest.raises(GarrisonError) as caught:
        open_package(package.folder)
    assert caught.value.code == "package.blob_changed"


def test_a_missing_blob_is_noticed(tmp_path: Path) -> None:
    package = make_package(tmp_path)
    package.blobs[0].path.unlink()

    with pytest.raises(GarrisonError) as caught:
        open_package(package.folder)
    assert caught.value.code == "package.blob_missing"


def test_a_chunk_list_of_another_file_is_noticed(tmp_path: Path) -> None:
    package = make_package(tmp_path)
    (file,) = package.manifest.variants[0].files
    wrong = hashlib.sha256(b"another").digest() * -(-file.size // 4096)
    (package.folder / "blobs" / sha256_hex(wrong)).write_bytes(wrong)
    manifest = package.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(file.chunks_sha256, sha256_hex(wrong)))

    with pytest.raises(GarrisonError) as caught:
        open_package(package.folder)
    assert caught.value.code == "package.chunks_wrong"


def test_file_options() -> None:
    assert sources_from_options(["a=b", "q4:c=d=e"]) == {"a": Path("b"), "q4:c": Path("d=e")}
    for bad in (["a"], ["=b"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(GarrisonError) as caught:
            sources_from_options(bad)
        assert caught.value.code == "package.file_option"
