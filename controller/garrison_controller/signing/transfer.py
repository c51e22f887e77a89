"""A workspace on its way between signers: an archive of public files, believed only after everything in it verified.

The archive is a plain tar of the workspace's own files (or a folder of them), nothing else. Signatures are merged, so
that signers may work on copies at the same time.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Metadata, Root, Targets

from garrison_controller.signing.families import TARGETS
from garrison_controller.signing.metadata import MAX_TARGETS_BYTES, UNFINISHED, file_name, to_bytes, write_durable
from garrison_controller.signing.verification import Verified, all_targets, verify_workspace
from garrison_controller.signing.workspace import Workspace, first_root_sha256
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError

MAX_FILES = 20_000
MAX_TOTAL_BYTES = 512 * 1024 * 1024
MAX_FILE_BYTES = MAX_TARGETS_BYTES
_DIGEST, _NAME = r"[0-9a-f]{64}", r"[a-z0-9][a-z0-9._-]*"
_KNOWN = re.compile(
    rf"(metadata|pending)/[1-9][0-9]{{0,9}}\.(root|targets|family-[a-z0-9-]+)\.json"
    rf"|targets/{_DIGEST}\.fleet\.json"
    rf"|targets/models/{_NAME}/[0-9.]+/{_DIGEST}\.manifest\.json"
)


@dataclass(frozen=True)
class Imported:
    """What an import brought: ``versions`` in the workspace afterwards, ``signatures`` added by role."""

    verified: Verified
    signatures: dict[str, int]


def export_workspace(workspace: Workspace, out: Path) -> int:
    """Write the workspace's public files to the new tar file ``out``; return their number.

    Raises:
        NotFoundError: ``signing.workspace_empty``.
        InvalidError: ``signing.archive_refused``: a link, or a file that is none of a workspace's.
        ConflictError: ``signing.archive_exists``.
    """
    if not first_root_sha256(workspace):
        raise NotFoundError("signing.workspace_empty", f"{workspace.folder} holds no registry")
    try:
        with out.open("xb") as file, tarfile.open(fileobj=file, mode="w") as archive:
            count = 0
            for name, data in _folder_files(workspace.folder):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                archive.addfile(member, io.BytesIO(data))
                count += 1
    except FileExistsError as error:
        raise ConflictError("signing.archive_exists", f"{out} exists already", hint="choose another --out") from error
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return count


def import_workspace(workspace: Workspace, source: Path, first_root: str | None, now: datetime) -> Imported:
    """Take over what ``source``, an archive or a folder, has more than ``workspace``; nothing changes unless all holds.

    ``first_root`` is the SHA-256 of 1.root.json, which an empty workspace needs once a root is published.

    Raises:
        InvalidError: ``signing.archive_refused``, ``signing.first_root_unknown``.
        RefusedError: ``signing.import_older`` (a rollback), ``signing.import_forked``, ``signing.import_unsigned``, and
            as ``verify_workspace``.
        ConflictError: ``signing.pending_differs``.
    """
    with tempfile.TemporaryDirectory(prefix="garrison-import-") as folder:
        incoming = Workspace(Path(folder))
        for name, data in _archive_files(source):
            path = incoming.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        verified = verify_workspace(incoming, now, _expected_root(workspace, incoming, first_root))
        _refuse_older_or_forked(workspace, incoming, verified)
        pending = dict(_merge_pending(workspace, incoming))
        _take(workspace, incoming, verified, pending)
        return Imported(verified, {role: added for role, (_, added) in pending.items()})


def _expected_root(workspace: Workspace, incoming: Workspace, given: str | None) -> str | None:
    """Return what the incoming 1.root.json must be; None while there is only a draft, which signers must review."""
    if workspace.root_versions() and incoming.root_versions():
        return first_root_sha256(workspace)
    if given is None and incoming.root_versions():
        raise InvalidError(
            "signing.first_root_unknown",
            f"{workspace.folder} has no root to start from",
            hint="give --root-sha256 with the digest of 1.root.json that another signer tells you",
        )
    return given


def _refuse_older_or_forked(workspace: Workspace, incoming: Workspace, verified: Verified) -> None:
    ours = {"root": workspace.published_root(), TARGETS: workspace.published_targets()}
    for role, mine in ours.items():
        if mine is not None and mine.signed.version > verified.versions.get(role, 0):
            raise RefusedError(
                "signing.import_older",
                f"the archive has {role} version {verified.versions.get(role, 0)}, and {workspace.folder} has"
                f" {mine.signed.version}",
                hint="ask for a newer export; if there is none, find out who offers an old one",
                role=role,
            )
    for version in workspace.root_versions():
        name = file_name("root", version)
        if (workspace.folder / "metadata" / name).read_bytes() != (incoming.folder / "metadata" / name).read_bytes():
            raise _forked("root", version)
    for role, version in verified.versions.items():
        if role == "root":
            continue
        known, other = workspace.published_targets(role), incoming.published_targets(role)
        assert other is not None
        if known is None:
            continue
        if known.signed.version > version:
            raise RefusedError(
                "signing.import_older", f"the archive has an older {role} than {workspace.folder}", role=role
            )
        if known.signed.version == version and known.signed != other.signed:
            raise _forked(role, version)


def _forked(role: str, version: int) -> RefusedError:
    return RefusedError(
        "signing.import_forked",
        f"{role} version {version} is signed with two contents",
        hint="sign nothing; compare with the other signers who made the second one",
        role=role,
    )


def _merge_pending(
    workspace: Workspace, incoming: Workspace
) -> Iterator[tuple[str, tuple[Metadata[Root] | Metadata[Targets], int]]]:
    """Yield for each pending role of ``incoming`` what shall be pending, and how many signatures are new in it."""
    try:
        progress = incoming.progress()
    except ConflictError as error:
        if error.code != "signing.nothing_pending":
            raise
        return
    for role, results in progress.items():
        theirs = incoming.pending(role)
        valid = {keyid for result in results for keyid in result.signed}
        known = valid | {keyid for result in results for keyid in result.unsigned}
        if wrong := sorted((theirs.signatures.keys() & known) - valid):
            raise RefusedError(
                "signing.import_unsigned",
                f"the archive has a signature of {wrong[0][:12]} on {role} that does not verify",
                hint="whoever changed the archive is no signer; ask for it again",
                role=role,
            )
        theirs.signatures = {keyid: one for keyid, one in theirs.signatures.items() if keyid in valid}
        mine = _own_pending(workspace, role)
        if mine is None or mine.signed.version < theirs.signed.version:
            yield role, (theirs, len(theirs.signatures))
            continue
        if mine.signed != theirs.signed:
            raise ConflictError(
                "signing.pending_differs",
                f"another {role} version {mine.signed.version} waits for signatures in {workspace.folder}",
                hint=f"agree with the others on one; to take theirs, remove {workspace.folder / 'pending'} first",
            )
        before = len(mine.signatures)
        mine.signatures.update({k: v for k, v in theirs.signatures.items() if k not in mine.signatures})
        yield role, (mine, len(mine.signatures) - before)


def _own_pending(workspace: Workspace, role: str) -> Metadata[Root] | Metadata[Targets] | None:
    return workspace.pending_root() if role == "root" else workspace.pending_targets(role)


def _take(
    workspace: Workspace,
    incoming: Workspace,
    verified: Verified,
    pending: dict[str, tuple[Metadata[Root] | Metadata[Targets], int]],
) -> None:
    """Keep what was verified, and nothing that merely lay beside it: targets first, then what names them."""
    for metadata in all_targets(incoming):
        for target in metadata.signed.targets.values():
            workspace.record_target(target, incoming.target_bytes(target))
    for role, newest in verified.versions.items():
        for version in incoming.root_versions() if role == "root" else [newest]:
            path = incoming.folder / "metadata" / file_name(role, version)
            workspace.record_published(role, version, path.read_bytes())
    for role, (draft, _) in pending.items():
        write_durable(workspace.folder / "pending" / file_name(role, draft.signed.version), to_bytes(draft))


def _archive_files(source: Path) -> Iterator[tuple[str, bytes]]:
    if not source.exists():
        raise NotFoundError("signing.archive_missing", f"there is no {source}", hint="name what the export wrote")
    return _bounded(_folder_files(source) if source.is_dir() else _tar_files(source))


def _bounded(files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    total, seen = 0, set[str]()
    for name, data in files:
        total += len(data)
        if name in seen or len(seen) >= MAX_FILES or total > MAX_TOTAL_BYTES:
            raise _refused(f"{name} is there twice, or there is too much in all")
        seen.add(name)
        yield name, data


def _tar_files(source: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(source, mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if not member.isreg() or _KNOWN.fullmatch(member.name) is None or member.size > MAX_FILE_BYTES:
                    raise _refused(f"{member.name[:128]!r} is no plain file of a workspace")
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()
    except tarfile.TarError as error:
        raise _refused(f"{source} is no tar archive: {error}") from error


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the workspace files below ``folder``; what else lies beside its three folders is not looked at."""
    for part in ("metadata", "pending", "targets"):
        top = folder / part
        if top.is_symlink():
            raise _refused(f"{top} is a link")
        for at, folders, names in os.walk(top):
            for name in sorted((*folders, *names)):
                path = Path(at) / name
                if path.is_symlink():
                    raise _refused(f"{path} is a link")
            for name in sorted(names):
                if name.endswith(UNFINISHED):
                    continue  # a write that was cut off left it; its whole file is there, or comes again
                path = Path(at) / name
                relative = path.relative_to(folder).as_posix()
                if not path.is_file() or _KNOWN.fullmatch(relative) is None or path.stat().st_size > MAX_FILE_BYTES:
                    raise _refused(f"{relative!r} is no plain file of a workspace")
                yield relative, path.read_bytes()


def _refused(what: str) -> InvalidError:
    return InvalidError(
        "signing.archive_refused", what, hint="make it with `garrison registry workspace export`, and nothing else"
    )
