from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from garrison_controller.signing.metadata import parse_root, parse_targets, to_bytes
from garrison_controller.signing.transfer import export_workspace, import_workspace
from garrison_controller.signing.verification import verify_workspace
from garrison_controller.signing.workspace import Workspace, first_root_sha256
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, RefusedError
from tests.fakes.ceremony import NOW, Ceremony, later, make_ceremony, make_package


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    """A registry whose first versions are published."""
    ceremony = make_ceremony(tmp_path)
    ceremony.sign("alice", "bob", "dan", "erin")
    publish(ceremony)
    return ceremony


def publish(ceremony: Ceremony) -> None:
    for role, data in ceremony.workspace.completed().items():
        version = parse_root(data).signed.version if role == "root" else parse_targets(data).signed.version
        ceremony.workspace.record_published(role, version, data)


def archived(workspace: Workspace, out: Path) -> Path:
    export_workspace(workspace, out)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_signers_workspace_becomes_the_same(ceremony: Ceremony, tmp_path: Path) -> None:
    ceremony.workspace.add_package(make_package(tmp_path), days=365, now=NOW)
    ceremony.sign("dan")
    copy = Workspace(tmp_path / "copy")
    digest = first_root_sha256(ceremony.workspace)

    imported = import_workspace(copy, archived(ceremony.workspace, tmp_path / "a.tar"), digest, NOW)
    assert imported.verified.versions == {"root": 1, "targets": 1}
    assert imported.signatures == {"targets": 1}
    assert files(copy.folder) == files(ceremony.workspace.folder)
    copy.sign(ceremony.signers["erin"])
    back = import_workspace(ceremony.workspace, copy.folder, None, NOW)
    assert back.signatures == {"targets": 1}
    publish(ceremony)
    assert verify_workspace(ceremony.workspace, NOW, digest).versions == {"root": 1, "targets": 2}


def test_signatures_made_at_the_same_time_are_joined(tmp_path: Path) -> None:
    ceremony = make_ceremony(tmp_path)
    copies = [Workspace(tmp_path / name) for name in ("one", "two")]
    source = archived(ceremony.workspace, tmp_path / "a.tar")
    for copy, names in zip(copies, (("alice", "dan"), ("bob", "erin")), strict=True):
        import_workspace(copy, source, None, NOW)
        for name in names:
            copy.sign(ceremony.signers[name])
        import_workspace(ceremony.workspace, copy.folder, None, NOW)
    publish(ceremony)
    assert ceremony.workspace.root_versions() == [1]


def test_only_public_files_travel(ceremony: Ceremony, tmp_path: Path) -> None:
    (ceremony.workspace.folder / "alice.key").write_text("a private key, put there by mistake")
    with tarfile.open(archived(ceremony.workspace, tmp_path / "a.tar")) as archive:
        names = archive.getnames()
    assert {name.split("/")[0] for name in names} == {"metadata", "targets"}
    with pytest.raises(ConflictError, match=r"signing\.archive_exists"):
        export_workspace(ceremony.workspace, tmp_path / "a.tar")
    (ceremony.workspace.folder / "metadata" / "alice.key").write_text("likewise")
    with pytest.raises(InvalidError, match=r"signing\.archive_refused"):
        export_workspace(ceremony.workspace, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_an_empty_workspace_needs_the_digest_of_the_first_root(ceremony: Ceremony, tmp_path: Path) -> None:
    source = archived(ceremony.workspace, tmp_path / "a.tar")
    for digest, code in ((None, "signing.first_root_unknown"), ("0" * 64, "signing.first_root_mismatch")):
        with pytest.raises(GarrisonError) as caught:
            import_workspace(Workspace(tmp_path / "copy"), source, digest, NOW)
        assert caught.value.code == code
    assert not (tmp_path / "copy").exists()


def test_another_fleets_registry_is_refused(ceremony: Ceremony, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_ceremony(tmp_path / "other")
    other.sign("alice", "bob", "dan", "erin")
    publish(other)
    with pytest.raises(RefusedError) as caught:
        import_workspace(ceremony.workspace, other.workspace.folder, None, NOW)
    assert caught.value.code == "signing.first_root_mismatch"


def test_two_contents_under_one_version_are_an_alarm(ceremony: Ceremony, tmp_path: Path) -> None:
    copy = Workspace(tmp_path / "copy")
    digest = first_root_sha256(ceremony.workspace)
    import_workspace(copy, ceremony.workspace.folder, digest, NOW)
    other = Ceremony(tmp_path, ceremony.online, ceremony.signers, copy)
    for one, name in ((ceremony, "tiny"), (other, "large")):
        one.workspace.add_package(make_package(tmp_path / name, name), days=365, now=NOW)
    with pytest.raises(ConflictError) as pending:
        import_workspace(copy, ceremony.workspace.folder, None, NOW)
    assert pending.value.code == "signing.pending_differs"
    for one in (ceremony, other):
        one.sign("dan", "erin")
        publish(one)
    with pytest.raises(RefusedError) as published:
        import_workspace(copy, ceremony.workspace.folder, None, NOW)
    assert published.value.code == "signing.import_forked"


def test_what_nothing_vouches_for_stays_behind(ceremony: Ceremony, tmp_path: Path) -> None:
    copy = Workspace(tmp_path / "copy")
    import_workspace(copy, ceremony.workspace.folder, first_root_sha256(ceremony.workspace), NOW)
    before = files(copy.folder)
    folder = ceremony.workspace.folder
    stray = parse_targets((folder / "metadata" / "1.targets.json").read_bytes())
    stray.signed.version, stray.signed.delegations = 999, None
    (folder / "metadata" / "999.family-x.json").write_bytes(to_bytes(stray))
    (folder / "targets" / f"{'0' * 64}.fleet.json").write_text("of the attacker's")
    import_workspace(copy, archived(ceremony.workspace, tmp_path / "a.tar"), None, NOW)
    assert files(copy.folder) == before


def test_verification_names_what_has_expired(ceremony: Ceremony) -> None:
    found = verify_workspace(ceremony.workspace, later(days=400))
    assert (found.expired, found.targets) == (("targets",), 1)


def test_a_name_that_lies_about_the_version_is_noticed(ceremony: Ceremony) -> None:
    folder = ceremony.workspace.folder / "metadata"
    (folder / "1.targets.json").rename(folder / "7.targets.json")
    with pytest.raises(InvalidError) as caught:
        verify_workspace(ceremony.workspace, NOW)
    assert caught.value.code == "registry.version_mislabelled"


def test_a_published_version_without_its_signatures_is_noticed(ceremony: Ceremony) -> None:
    path = ceremony.workspace.folder / "metadata" / "1.targets.json"
    metadata = parse_targets(path.read_bytes())
    metadata.signatures.popitem()
    path.write_bytes(to_bytes(metadata))
    with pytest.raises(RefusedError) as caught:
        verify_workspace(ceremony.workspace, NOW)
    assert caught.value.code == "registry.threshold_unmet"


def hostile(folder: Path, ceremony: Ceremony, member: tarfile.TarInfo, data: bytes = b"") -> Path:
    """Return an archive of the workspace with one more member."""
    path = archived(ceremony.workspace, folder / "hostile.tar")
    with tarfile.open(path, "a") as archive:
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside.json", tarfile.REGTYPE),
        ("/tmp/outside.json", tarfile.REGTYPE),
        ("metadata/../../outside.json", tarfile.REGTYPE),
        ("targets/models/../../../1/" + "0" * 64 + ".manifest.json", tarfile.REGTYPE),
        ("metadata/2.root.json", tarfile.SYMTYPE),
        ("metadata/2.root.json", tarfile.LNKTYPE),
        ("metadata/2.root.json", tarfile.FIFOTYPE),
        ("metadata/1.root.json", tarfile.REGTYPE),
        ("metadata/readme.txt", tarfile.REGTYPE),
        ("pending/1.snapshot.json", tarfile.REGTYPE),
        ("alice.key", tarfile.REGTYPE),
    ],
)
def test_anything_but_a_workspaces_own_files_is_refused(
    ceremony: Ceremony, tmp_path: Path, name: str, kind: bytes
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    source = hostile(tmp_path, ceremony, member)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidError) as caught:
        import_workspace(Workspace(tmp_path / "copy"), source, first_root_sha256(ceremony.workspace), NOW)
    assert caught.value.code == "signing.archive_refused"
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    for name, code in (("a.tar", "signing.archive_refused"), ("none", "signing.archive_missing")):
        with pytest.raises(GarrisonError) as caught:
            import_workspace(Workspace(tmp_path / "copy"), tmp_path / name, None, NOW)
        assert caught.value.code == code


def test_what_a_cut_off_write_left_stays_behind(ceremony: Ceremony, tmp_path: Path) -> None:
    (ceremony.workspace.folder / "metadata" / "2.targets.json.new").write_bytes(b'{"half')
    with tarfile.open(archived(ceremony.workspace, tmp_path / "a.tar")) as archive:
        assert not any(name.endswith(".new") for name in archive.getnames())
