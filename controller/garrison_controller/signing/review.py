"""What exactly a signature would approve, in words: read by a person before the key is used.

Every statement is taken from bytes checked against the digests that the signature will cover, and compared with what
is published, after that was verified itself. A change that cannot be shown is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from tuf.api.metadata import Metadata, Root, TargetFile, Targets, VerificationResult

from garrison_controller.devices.ca import fingerprint
from garrison_controller.signing.families import TARGETS, check_delegations, check_paths, families, refuse_unless_valid
from garrison_controller.signing.keys import signer_name
from garrison_controller.signing.metadata import (
    read_target,
    refuse_expired,
    refuse_oversized_target,
    refuse_unsigned,
    target_changes,
    target_digest,
)
from garrison_controller.signing.workspace import Workspace
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.fleet import Fleet, FleetKey
from garrison_protocol.manifest import Manifest, Variant


@dataclass(frozen=True)
class Progress:
    """Who has signed, by one rule; a new root is judged by two (``by`` says which)."""

    by: str
    threshold: int
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Tell whether enough have signed."""
        return len(self.signed) >= self.threshold


@dataclass(frozen=True)
class Change:
    """One thing that becomes different: ``kind`` is added, changed, or removed; ``facts`` say how.

    Kind ``within`` names the delegation by which a family's signers sign, which stays as it is.
    """

    kind: str
    subject: str
    facts: dict[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Review:
    """One pending role."""

    role: str
    version: int
    expires: datetime
    changes: tuple[Change, ...]
    progress: tuple[Progress, ...]

    @property
    def complete(self) -> bool:
        """Tell whether the role needs no further signature."""
        return all(progress.met for progress in self.progress)

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "role": self.role,
            "version": self.version,
            "expires": self.expires.isoformat(),
            "changes": [{"kind": one.kind, "subject": one.subject, **one.facts} for one in self.changes],
            "progress": [
                {"by": one.by, "threshold": one.threshold, "signed": one.signed, "unsigned": one.unsigned}
                for one in self.progress
            ],
            "complete": self.complete,
        }


def review(workspace: Workspace, now: datetime) -> list[Review]:
    """Return what waits for signatures in ``workspace``.

    Raises:
        ConflictError: ``signing.nothing_pending``, ``registry.version_not_next``.
        RefusedError: ``registry.metadata_expired``, ``registry.target_changed``, ``registry.threshold_unmet`` (what is
            said to be published is not properly signed).
        NotFoundError: ``signing.target_missing``.
        InvalidError: ``registry.target_path``, ``registry.target_mismatch``, ``registry.target_too_large``,
            ``registry.delegation_malformed``.
        RefusedError: ``registry.outside_delegation``, ``registry.role_unknown``.
    """
    reviews = []
    for role, results in workspace.progress().items():
        metadata = workspace.pending(role)
        refuse_expired(role, metadata.signed.expires, now)
        if isinstance(metadata.signed, Root):
            changes = tuple(_root_changes(workspace.published_root(), metadata.signed))
        else:
            changes = tuple(_targets_changes(workspace, role, metadata.signed))
        progress = _progress(role, results)
        reviews.append(Review(role, metadata.signed.version, metadata.signed.expires, changes, progress))
    return reviews


def _progress(role: str, results: list[VerificationResult]) -> tuple[Progress, ...]:
    names = ("the published root", "the new root") if len(results) == 2 else (f"the {role} role",)
    return tuple(
        Progress(
            by,
            result.threshold,
            tuple(sorted(signer_name(key) for key in result.signed.values())),
            tuple(sorted(signer_name(key) for key in result.unsigned.values())),
        )
        for by, result in zip(names, results, strict=True)
    )


def _root_changes(published: Metadata[Root] | None, new: Root) -> Iterator[Change]:
    for role in ("root", "targets", "snapshot", "timestamp"):
        before = {} if published is None else {k: published.signed.keys[k] for k in published.signed.roles[role].keyids}
        after = {keyid: new.keys[keyid] for keyid in new.roles[role].keyids}
        for keyid in sorted(after.keys() - before.keys()):
            yield Change("added", f"{role} key of {signer_name(after[keyid])}", {"keyid": keyid})
        for keyid in sorted(before.keys() - after.keys()):
            yield Change("removed", f"{role} key of {signer_name(before[keyid])}", {"keyid": keyid})
        was = None if published is None else published.signed.roles[role].threshold
        now = new.roles[role].threshold
        if was != now:
            of = f"{now} of {len(after)}"
            yield Change("added" if was is None else "changed", f"{role} threshold", {"threshold": of})


def _targets_changes(workspace: Workspace, role: str, new: Targets) -> Iterator[Change]:
    published = _published(workspace, role)
    if role == TARGETS:
        check_delegations(new)
        yield from _delegation_changes(published, new)
    else:
        check_paths(families(workspace.current_targets().signed)[role], new)
        yield _delegation(workspace.current_targets().signed, role, "within")
    for change in target_changes(published, new):
        if change.target is None:
            yield Change("removed", change.path)
            continue
        document = _document(workspace, change.target)
        if isinstance(document, Manifest):
            facts = {"role": role} | _manifest_facts(change.target, document)
            yield Change(change.kind, f"model {document.id}", facts)
        else:
            before = None if change.before is None else _document(workspace, change.before)
            assert before is None or isinstance(before, Fleet)
            yield Change(change.kind, change.path, _fleet_facts(change.target, before, document))


def _published(workspace: Workspace, role: str) -> Targets | None:
    """Return what is published of ``role``, verified; None for a family that nothing published vouches for."""
    targets, root = workspace.published_targets(), workspace.published_root()
    if targets is not None and root is not None:
        verified = root.signed.get_verification_result(TARGETS, targets.signed_bytes, targets.signatures)
        refuse_unsigned(TARGETS, targets.signed.version, verified)
    if role == TARGETS:
        return None if targets is None else targets.signed
    family = workspace.published_targets(role)
    if targets is None or family is None or role not in families(targets.signed):
        return None
    refuse_unless_valid(targets.signed, role, family)
    return family.signed


def _delegation_changes(before: Targets | None, after: Targets) -> Iterator[Change]:
    old, new = {} if before is None else families(before), families(after)
    for role in sorted(old.keys() | new.keys()):
        if role not in new:
            assert before is not None
            yield _delegation(before, role, "removed")
        elif old.get(role) != new[role]:
            yield _delegation(after, role, "changed" if role in old else "added")


def _delegation(targets: Targets, role: str, kind: str) -> Change:
    delegated, delegations = families(targets)[role], targets.delegations
    assert delegations is not None
    people = (f"{signer_name(delegations.keys[keyid])} ({keyid})" for keyid in sorted(delegated.keyids))
    facts: dict[str, str | int] = {
        "paths": ", ".join(delegated.paths or ()),
        "threshold": f"{delegated.threshold} of {len(delegated.keyids)}",
        "signers": ", ".join(people),
    }
    return Change(kind, f"delegation {role}", facts)


def _document(workspace: Workspace, target: TargetFile) -> Manifest | Fleet:
    refuse_oversized_target(target)
    return read_target(target, workspace.target_bytes(target))


def _manifest_facts(target: TargetFile, manifest: Manifest) -> dict[str, str | int]:
    return {
        "manifest_sha256": target_digest(target),
        "alias": manifest.alias,
        "publisher": manifest.publisher,
        "license": manifest.license,
        "task": manifest.task,
        "variants": "; ".join(map(_variant, manifest.variants)),
        "size_bytes": sum(variant.size_bytes for variant in manifest.variants),
        "cases": len(manifest.evaluation.cases),
        "min_accuracy": str(manifest.evaluation.min_accuracy),
        "source": manifest.provenance.source,
        "lease": "" if manifest.lease is None else f"{manifest.lease.days} days, then {manifest.lease.on_expiry}",
        "made by": _maker(manifest),
    }


def _variant(variant: Variant) -> str:
    """Name every file of a variant: a signature approves the last one as much as the first."""
    files = [f"{file.path} sha256 {file.sha256}" for file in variant.files]
    settings = [f"{name}={value}" for name, value in sorted(variant.model_settings.items())]
    facts = [variant.runtime.engine.value, f"{variant.size_bytes} bytes", *files, *settings]
    return f"{variant.name} ({', '.join(facts)})"


def _maker(manifest: Manifest) -> str:
    """Say whose key signed the model's files; compare it with what its maker publishes."""
    signature = manifest.provenance.signature
    if signature is None:
        return "unknown: no model signature"
    return f"holder of the key sha256 {signature.key_sha256} ({signature.format}, bundle {signature.bundle_sha256})"


def _key_facts(before: tuple[FleetKey, ...], after: tuple[FleetKey, ...]) -> dict[str, str]:
    """Return every online key that comes, goes, or holds for another time; none hides behind another of its purpose."""
    left = {(key.purpose, key.public): key for key in before}
    lines: dict[str, list[str]] = {}
    for key in after:
        was = left.pop((key.purpose, key.public), None)
        span = f"{key.public} from {key.not_before:%Y-%m-%d} until {key.not_after:%Y-%m-%d}"
        if was is None:
            lines.setdefault(f"new {key.purpose.value} key", []).append(span)
        elif was != key:
            lines.setdefault(f"changed {key.purpose.value} key", []).append(f"{span} (was {was.not_after:%Y-%m-%d})")
    for key in left.values():
        lines.setdefault(f"withdrawn {key.purpose.value} key", []).append(key.public)
    return {name: "; ".join(found) for name, found in lines.items()}


def _authority_facts(name: str, before: str, after: str) -> dict[str, str]:
    """Return every certificate authority that comes or goes."""
    if before == after:
        return {}
    old, new = _authorities(before), _authorities(after)
    facts = {
        f"new {name}": "; ".join(said for sha256, said in new.items() if sha256 not in old),
        f"withdrawn {name}": "; ".join(said for sha256, said in old.items() if sha256 not in new),
    }
    facts = {fact: said for fact, said in facts.items() if said}
    return facts or {name: f"replaced, sha256 {sha256_hex(after.encode())}"}


def _authorities(pem: str) -> dict[str, str]:
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
    except ValueError:
        return {}
    return {
        sha256: f"{one.subject.rfc4514_string()}, sha256 {sha256}, until {one.not_valid_after_utc:%Y-%m-%d}"
        for one in found
        for sha256 in [fingerprint(one)]
    }


def _fleet_facts(target: TargetFile, before: Fleet | None, after: Fleet) -> dict[str, str | int]:
    facts: dict[str, str | int] = {"sha256": target_digest(target), "fleet": after.name}
    facts |= _key_facts(() if before is None else before.keys, after.keys)
    for name in ("device_ca", "server_ca"):
        facts |= _authority_facts(name, "" if before is None else getattr(before, name), getattr(after, name))
    old_floors = {} if before is None else before.floors
    for model, version in sorted(after.floors.items()):
        if old_floors.get(model) != version:
            facts[f"floor of {model}"] = f"{old_floors.get(model, 'none')} -> {version}"
    for model in sorted(old_floors.keys() - after.floors.keys()):
        facts[f"floor of {model}"] = f"{old_floors[model]} -> none"
    return facts
