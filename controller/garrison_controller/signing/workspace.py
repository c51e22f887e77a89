"""The folder that release signers share (a repository, a drive): what is published and what waits for signatures.

``metadata/`` holds published versions by TUF file name, ``pending/`` the next ones, ``targets/`` the small files they
name (manifests, fleet.json) with their digests before their names. No private key ever lies here.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from securesystemslib.signer import Key, Signer, SSlibKey
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, TargetFile, Targets, VerificationResult

from garrison_controller.signing.families import (
    TARGETS,
    all_targets,
    families,
    family_progress,
    is_family_role,
    role_for,
)
from garrison_controller.signing.keys import signer_name
from garrison_controller.signing.metadata import (
    file_name,
    parse_root,
    parse_targets,
    prefixed_path,
    refuse_unsigned,
    root_progress,
    target_digest,
    targets_progress,
    to_bytes,
    write_durable,
)
from garrison_controller.signing.online import (
    CLOCK_TOLERANCE,
    OnlineKeys,
    delegate_online,
    fleet_bytes,
    fleet_document,
    replace_online_key,
)
from garrison_controller.signing.packing import Package
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET, Fleet, parse_fleet
from garrison_protocol.ids import version_key
from garrison_protocol.manifest import target_path


@dataclass(frozen=True)
class RoleKeys:
    """Who may sign a role, and how many of them must."""

    role: str
    keys: tuple[SSlibKey, ...]
    threshold: int

    def check(self) -> None:
        """Refuse a threshold that cannot be met or that one person meets twice.

        Raises:
            InvalidError: ``signing.threshold_invalid``, ``signing.key_twice``.
        """
        ids, names = {key.keyid for key in self.keys}, {signer_name(key) for key in self.keys}
        if len(ids) != len(self.keys) or len(names) != len(self.keys):
            raise InvalidError("signing.key_twice", f"a key or a signer's name stands twice in the {self.role} role")
        if not 1 <= self.threshold <= len(self.keys):
            raise InvalidError(
                "signing.threshold_invalid",
                f"{self.role}: a threshold of {self.threshold} with {len(self.keys)} keys",
                hint="give each signer's .pub.json, and a threshold between 1 and their number",
            )


@dataclass(frozen=True)
class Signed:
    """The outcome of one signature: ``new`` is False where the key had signed before."""

    role: str
    version: int
    new: bool


class Workspace:
    """What one workspace folder says. Methods read files afresh; one signer works at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._published = folder / "metadata"
        self._pending = folder / "pending"
        self._targets = folder / "targets"

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        online: OnlineKeys,
        fleet: str,
        root: RoleKeys,
        targets: RoleKeys,
        root_days: int,
        targets_days: int,
        online_days: int,
        now: datetime,
    ) -> Workspace:
        """Start a registry: root version 1 and targets version 1 with ``fleet.json``, both waiting for signatures.

        Raises:
            ConflictError: ``signing.workspace_exists``.
            InvalidError: ``signing.threshold_invalid``, ``signing.key_twice``, ``signing.online_malformed``.
        """
        workspace = cls(folder)
        if workspace.root_versions() or workspace.pending_root() is not None:
            raise ConflictError("signing.workspace_exists", f"{folder} already holds a registry")
        root.check()
        targets.check()
        now = now.replace(microsecond=0)
        signed = Root(version=1, expires=now + timedelta(days=root_days), consistent_snapshot=True)
        for role in (root, targets):
            for key in role.keys:
                signed.add_key(key, role.role)
            signed.roles[role.role].threshold = role.threshold
        delegate_online(signed, online)
        document = fleet_document(fleet, online, now - CLOCK_TOLERANCE, now + timedelta(days=online_days))
        draft = Metadata(Targets(version=1, expires=now + timedelta(days=targets_days)))
        workspace._put_target(draft, FLEET_TARGET, document)
        workspace._write_pending("root", to_bytes(Metadata(signed)), 1)
        workspace._write_pending("targets", to_bytes(draft), 1)
        return workspace

    def root_versions(self) -> list[int]:
        """Return the published root versions, ascending."""
        return _versions(self._published, "root")

    def published_root(self) -> Metadata[Root] | None:
        """Return the newest published root after checking every link of its chain from the first.

        Raises:
            RefusedError: ``registry.threshold_unmet``.
            ConflictError: ``registry.version_not_next`` if a version is missing.
        """
        root: Metadata[Root] | None = None
        for version in self.root_versions():
            following = parse_root((self._published / file_name("root", version)).read_bytes())
            for result in root_progress(root, following):
                refuse_unsigned("root", following.signed.version, result)
            root = following
        return root

    def published_targets(self, role: str = TARGETS) -> Metadata[Targets] | None:
        """Return the newest published metadata of the targets role, or of a family's ``role``."""
        versions = _versions(self._published, role)
        if not versions:
            return None
        return parse_targets((self._published / file_name(role, versions[-1])).read_bytes(), role)

    def pending_root(self) -> Metadata[Root] | None:
        """Return the root that waits for signatures, if any."""
        data = self._pending_bytes("root")
        return None if data is None else parse_root(data)

    def pending_targets(self, role: str = TARGETS) -> Metadata[Targets] | None:
        """Return the metadata of the targets role, or of a family's ``role``, that waits for signatures, if any."""
        data = self._pending_bytes(role)
        return None if data is None else parse_targets(data, role)

    def current_family(self, role: str) -> Metadata[Targets] | None:
        """Return a family's metadata as it will be: the pending one, else the published one."""
        return self.pending_targets(role) or self.published_targets(role)

    def current_families(self) -> dict[str, Metadata[Targets]]:
        """Return the metadata of every family that the current targets metadata delegates to, by role.

        Raises:
            NotFoundError: ``signing.workspace_empty``.
        """
        found = {role: self.current_family(role) for role in families(self.current_targets().signed)}
        return {role: metadata for role, metadata in found.items() if metadata is not None}

    def every_target(self) -> dict[str, tuple[str, TargetFile]]:
        """Return every target with the role that names it, by path, as it will be.

        Raises:
            NotFoundError: ``signing.workspace_empty``.
            ConflictError: ``registry.version_reused`` if two roles name one path.
        """
        of_families = {role: metadata.signed for role, metadata in self.current_families().items()}
        return all_targets(self.current_targets().signed, of_families)

    def find_target(self, path: str) -> tuple[str, TargetFile] | None:
        """Return the role that names the target at ``path``, and the target, as it will be; errors as above."""
        return self.every_target().get(path)

    def current_version(self, role: str) -> int:
        """Return the version of the targets role's or a family's metadata as it will be; 0 before the first."""
        metadata = self.current_targets() if role == TARGETS else self.current_family(role)
        return 0 if metadata is None else metadata.signed.version

    def current_root(self) -> Metadata[Root]:
        """Return the root by whose rules pending targets are judged: the pending one, else the published one.

        Raises:
            NotFoundError: ``signing.workspace_empty``.
        """
        root = self.pending_root() or self.published_root()
        if root is None:
            raise NotFoundError(
                "signing.workspace_empty",
                f"{self.folder} holds no registry",
                hint="`garrison registry init` starts one, `garrison registry pull` fetches an existing one",
            )
        return root

    def current_targets(self) -> Metadata[Targets]:
        """Return the targets metadata as it will be: the pending one, else the published one.

        Raises:
            NotFoundError: ``signing.workspace_empty``.
        """
        self.current_root()
        targets = self.pending_targets() or self.published_targets()
        if targets is None:
            raise NotFoundError("signing.workspace_empty", f"{self.folder} holds no targets metadata")
        return targets

    def target_bytes(self, target: TargetFile) -> bytes:
        """Return the bytes kept for ``target``; ``read_target`` checks them.

        Raises:
            NotFoundError: ``signing.target_missing``.
        """
        path = self._targets / prefixed_path(target)
        if not path.is_file():
            raise NotFoundError(
                "signing.target_missing",
                f"{path} is missing, so nobody can see what {target.path} says",
                hint="`garrison registry pull`, or take the whole workspace from the one who made the change",
            )
        return path.read_bytes()

    def fleet(self) -> Fleet:
        """Return fleet.json as it will be.

        Raises:
            NotFoundError: ``signing.workspace_empty``, ``signing.target_missing``.
        """
        target = self.current_targets().signed.targets.get(FLEET_TARGET)
        if target is None:
            raise NotFoundError("signing.target_missing", "the targets metadata names no fleet.json")
        return parse_fleet(self.target_bytes(target))

    def add_package(self, package: Package, *, days: int, now: datetime) -> bool:
        """Add ``package`` to the next version of the role that speaks for it; False if it is in already.

        That is the family's role that the targets role delegates it to, else targets itself. Signatures made before
        are dropped.

        Raises:
            ConflictError: ``package.version_reused`` if the version stands for another digest.
            RefusedError: ``package.below_floor``.
        """
        manifest = package.manifest
        path = target_path(manifest.name, manifest.version)
        role, known = self.find_target(path) or (role_for(self.current_targets().signed, path), None)
        if known is not None and target_digest(known) == package.manifest_sha256:
            return False
        published = self.published_targets(role)
        if published is not None and path in published.signed.targets:
            raise ConflictError(
                "package.version_reused",
                f"{manifest.id} is published already, with other content",
                hint="a version never changes: pack it again under a new version",
            )
        if self.fleet().below_floor(manifest.name, manifest.version):
            raise RefusedError("package.below_floor", f"{manifest.id} is below the floor in fleet.json")
        self._change_targets({path: package.manifest_bytes}, days=days, now=now, role=role)
        return True

    def set_floor(self, name: str, version: str, *, days: int, now: datetime) -> None:
        """Make ``version`` the lowest that boards may install of model ``name``, in the next targets version.

        Raises:
            InvalidError: ``signing.version_invalid``.
            RefusedError: ``signing.floor_lowered``: a floor only rises.
        """
        fleet = self.fleet()
        try:
            lower = version_key(version) < version_key(fleet.floors.get(name, "0"))
        except ValueError as error:
            raise InvalidError("signing.version_invalid", f"{version!r} is no version") from error
        if lower:
            raise RefusedError("signing.floor_lowered", f"the floor of {name} is {fleet.floors[name]} already")
        raised = fleet.model_copy(update={"floors": {**fleet.floors, name: version}})
        self.change_fleet(raised, days=days, now=now)

    def change_fleet(self, fleet: Fleet, *, days: int, now: datetime) -> int:
        """Put ``fleet`` as fleet.json into the next targets version, unsigned; return that version.

        Raises:
            NotFoundError: ``signing.workspace_empty``.
        """
        self._change_targets({FLEET_TARGET: fleet_bytes(fleet)}, days=days, now=now)
        return self.current_targets().signed.version

    def change_online_role(self, role: str, public_hex: str, *, days: int, now: datetime) -> int:
        """Let only the key ``public_hex`` sign ``role`` (snapshot or timestamp) in the next root; return its version.

        A pending root takes the change too, and loses its signatures.

        Raises:
            NotFoundError: ``signing.workspace_empty``.
            InvalidError: ``signing.online_malformed``.
        """
        root = parse_root(to_bytes(self.current_root())).signed
        if self.pending_root() is None:
            root.version += 1
        replace_online_key(root, role, public_hex)
        root.expires = now.replace(microsecond=0) + timedelta(days=days)
        self._write_pending("root", to_bytes(Metadata(root)), root.version)
        return root.version

    def rotate_root(
        self,
        *,
        add: Sequence[tuple[str, SSlibKey]],
        remove: Sequence[tuple[str, str]],
        thresholds: dict[str, int],
        days: int,
        now: datetime,
    ) -> int:
        """Prepare the next root version with keys added (role, key) and removed (role, signer); return its version.

        It needs a threshold of both the old and the new root keys. Published targets that would no longer meet their
        threshold are prepared again as the next version.

        Raises:
            NotFoundError: ``signing.signer_unknown``.
            ConflictError: ``signing.root_pending``.
            InvalidError: ``signing.threshold_invalid``, ``signing.key_twice``.
        """
        published = self.published_root()
        if published is None or self.pending_root() is not None:
            raise ConflictError("signing.root_pending", "a root waits for signatures; sign and push it first")
        root = parse_root(to_bytes(published)).signed
        for role, signer in remove:
            ids = [keyid for keyid in root.roles[role].keyids if signer_name(root.keys[keyid]) == signer]
            if not ids:
                raise NotFoundError(
                    "signing.signer_unknown",
                    f"{signer} holds no key of the {role} role",
                    hint="see `garrison registry key list`",
                )
            for keyid in ids:
                root.revoke_key(keyid, role)
        for role, key in add:
            root.add_key(key, role)
        for role in ("root", "targets"):
            root.roles[role].threshold = thresholds.get(role, root.roles[role].threshold)
            keys = tuple(key for key in _role_keys(root, role) if isinstance(key, SSlibKey))
            RoleKeys(role, keys, root.roles[role].threshold).check()
        root.version += 1
        root.expires = now.replace(microsecond=0) + timedelta(days=days)
        self._write_pending("root", to_bytes(Metadata(root)), root.version)
        targets = self.published_targets()
        if targets is not None and self.pending_targets() is None:
            kept = root.get_verification_result("targets", targets.signed_bytes, targets.signatures)
            if not kept.verified:
                self._change_targets({}, days=days, now=now)
        return root.version

    def sign(self, signer: Signer, only: Container[str] | None = None) -> list[Signed]:
        """Add this key's signature to every pending role it may sign; callers have shown the review before.

        ``only`` leaves out other roles.

        Raises:
            ConflictError: ``signing.nothing_pending``.
            RefusedError: ``signing.key_has_no_role``; ``signing.key_unusable``, ``signing.key_mismatch`` of a token.
        """
        outcomes = []
        for role, results in self.progress().items():
            keyid = signer.public_key.keyid
            if only is not None and role not in only:
                continue
            if not any(keyid in result.signed or keyid in result.unsigned for result in results):
                continue
            metadata = self.pending(role)
            new = not any(keyid in result.signed for result in results)
            if new:
                _sign(metadata, signer)
                self._write_pending(role, to_bytes(metadata), metadata.signed.version)
            outcomes.append(Signed(role, metadata.signed.version, new))
        if not outcomes:
            raise RefusedError(
                "signing.key_has_no_role",
                "this key may sign none of the pending roles",
                hint="`garrison registry status --workspace` names the signers of each role",
            )
        return outcomes

    def progress(self) -> dict[str, list[VerificationResult]]:
        """Return, for each pending role, who has signed and who has not; a new root is judged by two rules.

        A family's role is judged by the targets metadata as it will be.

        Raises:
            NotFoundError: ``signing.workspace_empty``.
            ConflictError: ``signing.nothing_pending``, ``registry.version_not_next``.
            RefusedError: ``registry.role_unknown`` for a pending role that nothing is delegated to.
        """
        found: dict[str, list[VerificationResult]] = {}
        root, targets = self.pending_root(), self.pending_targets()
        if root is not None:
            found["root"] = root_progress(self.published_root(), root)
        if targets is not None:
            rules = self.current_root().signed
            found[TARGETS] = [targets_progress(rules, self.published_targets(), targets)]
        for role in self.pending_families():
            family, published = self.pending_targets(role), self.published_targets(role)
            assert family is not None
            version = None if published is None else published.signed.version
            found[role] = [family_progress(self.current_targets().signed, role, version, family)]
        if not found:
            self.current_root()  # a mistyped folder is no registry in which nothing waits
            raise ConflictError(
                "signing.nothing_pending",
                "nothing waits for a signature",
                hint="`garrison model add` or `garrison model floor` prepares a change",
            )
        return found

    def completed(self) -> dict[str, bytes]:
        """Return the bytes of every pending role, all of them fully signed.

        Raises:
            RefusedError: ``registry.threshold_unmet``.
            ConflictError: ``signing.nothing_pending``.
        """
        complete: dict[str, bytes] = {}
        for role, results in self.progress().items():
            for result in results:
                refuse_unsigned(role, self.pending(role).signed.version, result)
            data = self._pending_bytes(role)
            assert data is not None
            complete[role] = data
        return complete

    def pending(self, role: str) -> Metadata[Root] | Metadata[Targets]:
        """Return what waits for signatures in ``role``.

        Raises:
            ConflictError: ``signing.nothing_pending``.
        """
        metadata = self.pending_root() if role == "root" else self.pending_targets(role)
        if metadata is None:
            raise ConflictError("signing.nothing_pending", f"nothing of the {role} role waits for a signature")
        return metadata

    def pending_families(self) -> list[str]:
        """Return the families' roles that wait for signatures."""
        names = {path.name.split(".")[1] for path in self._pending.glob("*.family-*.json")}
        return sorted(role for role in names if is_family_role(role))

    def propose(self, role: str, signed: Targets) -> None:
        """Put ``signed`` among what waits for signatures, unsigned, in place of an earlier draft of ``role``."""
        self._write_pending(role, to_bytes(Metadata(signed)), signed.version)
        self.drop_pending(role, but=signed.version)  # after it: a kill in between loses neither

    def drop_pending(self, role: str, *, but: int | None = None) -> None:
        """Forget every draft of ``role``, or all ``but`` one version."""
        for version in _versions(self._pending, role):
            if version != but:
                (self._pending / file_name(role, version)).unlink()

    def record_published(self, role: str, version: int, data: bytes) -> None:
        """Keep a published metadata file and drop the pending one that it settles."""
        write_durable(self._published / file_name(role, version), data)
        for pending in _versions(self._pending, role):
            if pending <= version:
                (self._pending / file_name(role, pending)).unlink()

    def record_target(self, target: TargetFile, data: bytes) -> None:
        """Keep the bytes of a published target, which the caller has checked."""
        write_durable(self._targets / prefixed_path(target), data)

    def first_root(self) -> bytes | None:
        """Return ``1.root.json``, published or pending, which boards pin."""
        for folder in (self._published, self._pending):
            path = folder / file_name("root", 1)
            if path.is_file():
                return path.read_bytes()
        return None

    def _change_targets(self, files: dict[str, bytes], *, days: int, now: datetime, role: str = TARGETS) -> None:
        pending = self.pending_targets(role)
        draft = pending or (self.current_targets() if role == TARGETS else self.published_targets(role))
        if draft is None:
            draft = Metadata(Targets(version=1, expires=now))
        elif pending is None:
            draft.signed.version += 1
        draft.signatures.clear()
        draft.signed.expires = now.replace(microsecond=0) + timedelta(days=days)
        for path, data in files.items():
            self._put_target(draft, path, data)
        self._write_pending(role, to_bytes(draft), draft.signed.version)

    def _put_target(self, draft: Metadata[Targets], path: str, data: bytes) -> None:
        target = TargetFile.from_data(path, data, ["sha256"])
        draft.signed.targets[path] = target
        self.record_target(target, data)

    def _pending_bytes(self, role: str) -> bytes | None:
        versions = _versions(self._pending, role)
        return (self._pending / file_name(role, versions[-1])).read_bytes() if versions else None

    def _write_pending(self, role: str, data: bytes, version: int) -> None:
        write_durable(self._pending / file_name(role, version), data)


def _sign(metadata: Metadata[Root] | Metadata[Targets], signer: Signer) -> None:
    try:
        metadata.sign(signer, append=True)
    except UnsignedMetadataError as error:
        if isinstance(error.__cause__, GarrisonError):  # a token that refused
            raise error.__cause__ from error
        raise


def first_root_sha256(workspace: Workspace) -> str:
    """Return the SHA-256 that enrolment strings carry, or "" while there is no root."""
    data = workspace.first_root()
    return "" if data is None else sha256_hex(data)


def _versions(folder: Path, role: str) -> list[int]:
    names = (path.name.split(".") for path in folder.glob(f"*.{role}.json"))
    return sorted(int(parts[0]) for parts in names if len(parts) == 3 and parts[0].isdigit())


def _role_keys(root: Root, role: str) -> list[Key]:
    return [root.keys[keyid] for keyid in root.roles[role].keyids]
