from __future__ import annotations

import io
from pathlib import Path

import pytest

from garrison_controller.registry import blobs as module
from garrison_controller.registry.blobs import BlobFolder
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError

DATA = bytes(range(256)) * 8
NAME = sha256_hex(DATA)


def receive(folder: BlobFolder, data: bytes, offset: int = 0, total: int = len(DATA), name: str = NAME) -> bool:
    incoming = folder.begin(name, offset, total)
    try:
        incoming.write(data)
        return incoming.finish()
    finally:
        incoming.close()


def test_a_blob_gets_its_name_when_all_of_it_was_checked(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    assert (folder.size(NAME), folder.received(NAME)) == (None, None)

    assert not receive(folder, DATA[:100])
    assert (folder.size(NAME), folder.received(NAME)) == (None, 100)
    assert receive(folder, DATA[100:], offset=100)
    assert (folder.size(NAME), folder.received(NAME)) == (len(DATA), None)
    assert folder.path(NAME).read_bytes() == DATA


def test_offset_zero_starts_afresh(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    receive(folder, b"wrong bytes, interrupted")
    assert receive(folder, DATA)


def test_wrong_bytes_are_refused_and_thrown_away(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    tampered = bytearray(DATA)
    tampered[3] ^= 1

    with pytest.raises(GarrisonError) as caught:
        receive(folder, bytes(tampered))
    assert (caught.value.code, caught.value.exit_status) == ("blob.digest_mismatch", 6)
    assert (folder.size(NAME), folder.received(NAME)) == (None, None)
    assert receive(folder, DATA)


def test_an_upload_continues_only_where_it_stopped(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    receive(folder, DATA[:100])

    with pytest.raises(GarrisonError) as caught:
        receive(folder, DATA[200:], offset=200)
    assert (caught.value.code, caught.value.fields["offset"]) == ("blob.offset_mismatch", 100)
    assert folder.received(NAME) == 100


def test_more_than_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GarrisonError) as caught:
        receive(BlobFolder(tmp_path), DATA + b"x")
    assert caught.value.code == "blob.too_long"


def test_two_uploads_of_one_blob_do_not_mix(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    first = folder.begin(NAME, 0, len(DATA))
    first.write(DATA[:10])

    with pytest.raises(GarrisonError) as caught:
        folder.begin(NAME, 0, len(DATA))
    assert (caught.value.code, caught.value.retryable) == ("blob.upload_in_progress", True)
    first.close()
    assert receive(folder, DATA[10:], offset=10)


def test_a_full_disk_is_noticed_before_the_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISK_RESERVE_BYTES", 1 << 62)

    with pytest.raises(GarrisonError) as caught:
        receive(BlobFolder(tmp_path), DATA)
    assert (caught.value.code, caught.value.exit_status) == ("disk.insufficient", 9)


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "A" * 64, NAME + "0"])
def test_only_digests_name_blobs(tmp_path: Path, name: str) -> None:
    with pytest.raises(GarrisonError) as caught:
        BlobFolder(tmp_path).size(name)
    assert caught.value.code == "blob.name_malformed"


def test_an_empty_blob(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    assert receive(folder, b"", total=0, name=sha256_hex(b""))
    assert folder.size(sha256_hex(b"")) == 0


def test_an_upload_that_waited_for_a_finished_one_leaves_the_blob_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = BlobFolder(tmp_path)
    first = folder.begin(NAME, 0, len(DATA))
    first.write(DATA)
    lock = module._lock

    def late(file: io.FileIO, sha256: str) -> None:
        assert first.finish()
        first.close()
        lock(file, sha256)

    monkeypatch.setattr(module, "_lock", late)
    with pytest.raises(GarrisonError) as caught:
        folder.begin(NAME, 0, len(DATA))
    assert (caught.value.code, caught.value.retryable) == ("blob.upload_in_progress", True)
    assert folder.path(NAME).read_bytes() == DATA
