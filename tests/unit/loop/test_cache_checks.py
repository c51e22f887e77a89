"""Installed files read back on demand: what is found, repaired, and recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from garrison_agent.api.cache_check import CacheCheck
from garrison_agent.api.commands import CheckCache
from garrison_agent.owner.jobs import IsCancelled, Report
from garrison_protocol.errors import ConflictError, InsufficientError, NotFoundError
from garrison_protocol.manifest import PackageRef
from tests.unit.loop.rig import Rig, entry, package


def check(rig: Rig, name: str | None = None, *, repair: bool = False) -> dict[str, str]:
    """Return the outcome of each file, by package and path."""
    job = rig.ask(CheckCache(name, repair)).result(0)
    assert isinstance(job, CacheCheck)
    view = job.view
    assert view["state"] == "done"
    return {f"{file['package']} {file['path']}": file["outcome"] for file in view["files"]}


def flip(rig: Rig, version: str = "1.0") -> None:
    """Change one byte of the package's only file, and leave its length."""
    path = rig.shelf.blobs.path(package(version).variant.files[0].sha256)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_whole_files_are_ok_and_recorded(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.deploy(package("2.0"), "r2")
    assert set(check(rig)) == {
        "chat:1.0 manifest.json",
        "chat:1.0 model.gguf",
        "chat:2.0 manifest.json",
        "chat:2.0 model.gguf",
    }
    assert set(check(rig).values()) == {"ok"}
    assert rig.headers("cache.checked")[0]["ok"] == 4
    assert rig.headers("cache.checked")[0]["models"] == ""


def test_one_package_by_any_of_its_names(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    for name in ("chat", "chat:1.0"):
        assert set(check(rig, name)) == {"chat:1.0 manifest.json", "chat:1.0 model.gguf"}
    with pytest.raises(NotFoundError, match=r"model\.unknown"):
        check(rig, "nobody")


def test_a_flipped_byte_a_cut_file_and_a_missing_one(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    path = rig.shelf.blobs.path(package("1.0").variant.files[0].sha256)
    flip(rig)
    assert check(rig)["chat:1.0 model.gguf"] == "damaged"
    path.write_bytes(path.read_bytes()[:-1])
    assert check(rig)["chat:1.0 model.gguf"] == "damaged"
    path.unlink()
    assert check(rig)["chat:1.0 model.gguf"] == "missing"
    assert rig.headers("cache.checked")[-1]["models"] == "chat:1.0"


def test_a_manifest_that_was_changed(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    path = rig.shelf.folder("chat", "1.0") / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")
    found = check(rig)
    assert (found["chat:1.0 manifest.json"], found["chat:1.0 model.gguf"]) == ("damaged", "ok")


def test_a_download_under_way_is_not_called_missing(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    two = package("2.0")
    rig.work.publish(two)
    rig.work.offline_now = True
    rig.desire(entry(two.ref, "r2"))
    rig.settle()
    assert set(check(rig)) == {"chat:1.0 manifest.json", "chat:1.0 model.gguf"}


def mend(rig: Rig) -> Callable[[PackageRef, str, Report, IsCancelled], int]:
    data = package("1.0").blobs[package("1.0").variant.files[0].sha256]

    def repair(ref: PackageRef, variant: str, report: Report, cancelled: IsCancelled) -> int:
        rig.shelf.blobs.path(package("1.0").variant.files[0].sha256).write_bytes(data)
        report(1, 1)
        return 1

    return repair


def test_repair_mends_what_is_wrong_and_nothing_else(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    assert set(check(rig, repair=True).values()) == {"ok"}
    assert not [one for one in rig.work.log if one.startswith("repair")]
    flip(rig)
    monkeypatch.setattr(rig.work, "repair", mend(rig))
    assert check(rig, repair=True)["chat:1.0 model.gguf"] == "repaired"
    assert rig.headers("cache.checked")[-1]["repaired"] == 1
    assert check(rig)["chat:1.0 model.gguf"] == "ok"


def test_a_repair_that_did_not_mend_says_why(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    flip(rig)
    assert check(rig, repair=True)["chat:1.0 model.gguf"] == "damaged"  # the controller's bytes were no better
    rig.work.offline_now = True
    job: Any = rig.ask(CheckCache(None, repair=True)).result(0)
    (wrong,) = [file for file in job.view["files"] if file["outcome"] != "ok"]
    assert wrong["detail"] == "not repaired: no network (source.unreachable)"


def test_one_at_a_time_and_cancelled_on_demand(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    job = rig.parts.cache_checks.begin(None, repair=False)
    with pytest.raises(ConflictError, match=r"cache\.check_busy"):
        rig.parts.cache_checks.begin(None, repair=False)
    job.cancel()
    rig.settle()
    assert job.view["state"] == "cancelled"
    assert rig.parts.cache_checks.begin(None, repair=False).id != job.id


def test_one_that_could_not_be_recorded_stands_in_nobodys_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")

    def full(*_: object, **__: object) -> None:
        raise InsufficientError("disk.full", "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.parts.journal, "append", full)
        with pytest.raises(InsufficientError):
            rig.parts.cache_checks.begin(None, repair=False)
    assert set(check(rig).values()) == {"ok"}
