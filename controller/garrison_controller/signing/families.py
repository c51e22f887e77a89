"""What may be delegated to a model family's own signers, and what such a role may say. PURE.

The targets role delegates ``models/<family>/*/manifest.json`` to a role ``family-<name>`` with its own keys and
threshold. Release signers' tools and the controller judge by these rules; boards need none of them, since TUF's own
path rules hold there. Source: docs/protocol.md, "Registry metadata"; TUF specification, 4.5 and 5.6.7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations

from tuf.api.metadata import DelegatedRole, Metadata, TargetFile, Targets, VerificationResult

from garrison_controller.signing.keys import signer_name
from garrison_controller.signing.metadata import refuse_unsigned, require_next_version
from garrison_protocol.errors import ConflictError, InvalidError, RefusedError

TARGETS = "targets"
FAMILY_PREFIX = "family-"
MAX_FAMILIES = 256
"""Each costs about 150 bytes of snapshot metadata, which every board fetches."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PATTERN = re.compile(r"models/([a-z0-9][a-z0-9._-]{0,127}\*?)/\*/manifest\.json")
_PATTERN_HINT = "use models/NAME/*/manifest.json, where NAME is a model's name or the beginning of one and '*'"


def family_role(name: str) -> str:
    """Return the TUF role of the family ``name``.

    Raises:
        InvalidError: ``signing.name_invalid``.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidError("signing.name_invalid", f"{name!r} cannot name a family", hint="use a-z, 0-9, '-'")
    return FAMILY_PREFIX + name


def is_family_role(role: str) -> bool:
    """Tell whether ``role`` can be a family's."""
    return role.startswith(FAMILY_PREFIX) and _NAME.fullmatch(role.removeprefix(FAMILY_PREFIX)) is not None


def families(targets: Targets) -> dict[str, DelegatedRole]:
    """Return the roles that ``targets`` delegates to, by name."""
    delegations = targets.delegations
    return {} if delegations is None or delegations.roles is None else dict(delegations.roles)


def role_for(targets: Targets, path: str) -> str:
    """Return the role that speaks for a new target at ``path``: a family's, else targets itself."""
    named = (name for name, role in families(targets).items() if role.is_delegated_path(path))
    return next(named, TARGETS)


def model_of(path: str) -> tuple[str, str]:
    """Return name and version of the model whose manifest lies at ``path``."""
    _, name, version, _ = path.split("/")
    return name, version


def check_delegations(targets: Targets) -> None:
    """Refuse delegations that two people could read differently.

    Each has its own families, terminates, and goes to different people; none covers ``fleet.json``.

    Raises:
        InvalidError: ``registry.delegation_malformed``.
        ConflictError: ``registry.delegations_overlap``.
    """
    delegations = targets.delegations
    if delegations is None:
        return
    if delegations.roles is None or len(delegations.roles) > MAX_FAMILIES:
        raise _malformed("there are hash bins, or more than 256 families")
    for name, role in delegations.roles.items():
        if not is_family_role(name):
            raise _malformed(f"{name!r} is no family's role")
        if not role.terminating or role.path_hash_prefixes is not None or not role.paths:
            raise _malformed(f"{name} does not terminate, or names no paths")
        for pattern in role.paths:
            check_pattern(pattern)
        if not set(role.keyids) <= delegations.keys.keys():
            raise _malformed(f"{name} names keys that are not there")
        people = [signer_name(delegations.keys[keyid]) for keyid in role.keyids]
        if len(set(people)) != len(people) or not 1 <= role.threshold <= len(people):
            raise _malformed(f"{name} has a threshold of {role.threshold} with the keys of {', '.join(people)}")
    for (one, first), (other, second) in combinations(delegations.roles.items(), 2):
        for pattern in first.paths or ():
            if any(_overlap(pattern, also) for also in second.paths or ()):
                raise ConflictError(
                    "registry.delegations_overlap",
                    f"{pattern} of {one} covers models of {other}",
                    hint="each model belongs to one family; narrow a pattern, or remove a delegation",
                )


def check_pattern(pattern: str) -> None:
    """Refuse a path pattern that is not a family's.

    Raises:
        InvalidError: ``registry.delegation_malformed``.
    """
    if _PATTERN.fullmatch(pattern) is None:
        raise InvalidError("registry.delegation_malformed", f"{pattern!r} is no family's pattern", hint=_PATTERN_HINT)


def check_paths(role: DelegatedRole, family: Targets) -> None:
    """Refuse a family's metadata that names a target outside its delegation.

    Raises:
        RefusedError: ``registry.outside_delegation``.
    """
    for path in family.targets:
        if not role.is_delegated_path(path):
            raise RefusedError(
                "registry.outside_delegation",
                f"{role.name} names {path}, which lies outside {', '.join(role.paths or ())}",
                hint="the release signers of the targets role must sign it, or delegate its family",
                role=role.name,
            )


def family_progress(
    targets: Targets, role: str, published_version: int | None, family: Metadata[Targets]
) -> VerificationResult:
    """Return who has signed ``family``, the next version of ``role``, by the delegation in ``targets``.

    Raises:
        ConflictError: ``registry.version_not_next``.
        RefusedError: ``registry.role_unknown``.
    """
    refuse_unknown(targets, role)
    require_next_version(role, published_version, family.signed.version)
    return targets.get_verification_result(role, family.signed_bytes, family.signatures)


def refuse_unless_valid(targets: Targets, role: str, family: Metadata[Targets]) -> None:
    """Refuse a family's metadata that ``targets`` does not, or no longer, vouch for.

    Raises:
        RefusedError: ``registry.role_unknown``, ``registry.threshold_unmet``, ``registry.outside_delegation``.
    """
    refuse_unknown(targets, role)
    refuse_unsigned(
        role, family.signed.version, targets.get_verification_result(role, family.signed_bytes, family.signatures)
    )
    check_paths(families(targets)[role], family.signed)


def refuse_unknown(targets: Targets, role: str) -> None:
    """Refuse a role that ``targets`` does not delegate to.

    Raises:
        RefusedError: ``registry.role_unknown``.
    """
    if role not in families(targets):
        raise RefusedError(
            "registry.role_unknown",
            f"the targets metadata delegates nothing to {role[:80]!r}",
            hint="`garrison registry delegate list`; a delegation is part of the targets metadata",
            role=role[:80],
        )


def all_targets(targets: Targets, of_families: Mapping[str, Targets]) -> dict[str, tuple[str, TargetFile]]:
    """Return every target with the role that speaks for it, by path.

    Raises:
        ConflictError: ``registry.version_reused`` if two roles speak for one path.
    """
    found: dict[str, tuple[str, TargetFile]] = {}
    for role, path, target in _every(targets, of_families):
        if path in found:
            raise ConflictError(
                "registry.version_reused",
                f"{path} is in {found[path][0]} already, so {role} may not name it",
                hint="a version of a model is published once; pack it again under a new version",
            )
        found[path] = (role, target)
    return found


def _every(targets: Targets, of_families: Mapping[str, Targets]) -> Iterator[tuple[str, str, TargetFile]]:
    for role, signed in ((TARGETS, targets), *of_families.items()):
        for path, target in signed.targets.items():
            yield role, path, target


def _overlap(one: str, other: str) -> bool:
    names = one.split("/")[1], other.split("/")[1]
    return _covers(*names) or _covers(*reversed(names))


def _covers(one: str, other: str) -> bool:
    return one == other or (one.endswith("*") and other.rstrip("*").startswith(one[:-1]))


def _malformed(what: str) -> InvalidError:
    return InvalidError(
        "registry.delegation_malformed",
        f"the delegations are not as Garrison makes them: {what}",
        hint="make them with `garrison registry delegate`",
    )
