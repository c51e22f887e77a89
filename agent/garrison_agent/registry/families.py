"""Model families with signers of their own: delegated targets metadata, fetched, kept, and verified one by one.

One family's fault is no other's: what does not verify is left out, with its code. Source: TUF specification, 5.6.7.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import BadVersionNumberError, LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, Snapshot, Targets
from tuf.ngclient import Updater

from garrison_agent.registry.cache import StoredState
from garrison_agent.registry.checks import require_version, signed, translated
from garrison_protocol.errors import NotFoundError, RefusedError


def family_file(role: str) -> str:
    """Return the name under which python-tuf keeps a delegated role's metadata."""
    return f"{quote(role, '')}.json"


def fetch_families(updater: Updater, targets: Targets, want: Sequence[str]) -> dict[str, str]:
    """Let python-tuf fetch what speaks for the paths in ``want``; return the roles at which it refused to go on."""
    refused: dict[str, str] = {}
    for path in want:
        if targets.delegations is None or path in targets.targets:
            continue
        roles = [role for role, _ in targets.delegations.get_roles_for_target(path)]
        if not roles or roles[0] in refused:
            continue
        try:
            with translated():
                updater.get_targetinfo(path)
        except (RefusedError, NotFoundError) as error:
            if not error.code.startswith(("registry.", "source.")):
                raise  # it is this board that is refused
            refused[roles[0]] = error.code
    return refused


def kept_families(folder: Path, snapshot: bytes, targets: Targets) -> dict[str, str]:
    """Return the delegated roles in ``folder`` that are as the snapshot names them; outdated ones are let go."""
    meta = Metadata[Snapshot].from_bytes(snapshot).signed.meta
    delegations = targets.delegations
    kept = {}
    for role in () if delegations is None or delegations.roles is None else delegations.roles:
        path, listed = folder / family_file(role), meta.get(f"{role}.json")
        if listed is None or not path.is_file():
            continue
        data = path.read_bytes()
        with contextlib.suppress(LengthOrHashMismatchError, UnicodeDecodeError):
            listed.verify_length_and_hashes(data)
            kept[role] = data.decode()
    return kept


def verified_families(
    state: StoredState, snapshot: Snapshot, targets: Targets, high_water: Mapping[str, int]
) -> tuple[dict[str, Targets], dict[str, str]]:
    """Return the families in ``state`` that verify, and the others with the code of the refusal."""
    verified: dict[str, Targets] = {}
    refused: dict[str, str] = {}
    for role, text in state.families.items():
        try:
            with translated():
                verified[role] = _family(role, text.encode(), snapshot, targets, high_water)
        except RefusedError as error:
            refused[role] = error.code
    return verified, refused


def _family(role: str, data: bytes, snapshot: Snapshot, targets: Targets, high_water: Mapping[str, int]) -> Targets:
    meta = snapshot.meta.get(f"{role}.json")
    if meta is None:
        raise RepositoryError(f"the snapshot names no {role}")
    meta.verify_length_and_hashes(data)
    family = signed(Targets, data, targets, role)
    require_version(role, family.version, meta.version)
    if family.delegations is not None:
        raise RepositoryError(f"{role} delegates further, which only targets may")
    seen = high_water.get(mark(targets, role), 0)
    if family.version < seen:
        raise BadVersionNumberError(f"{role} is version {family.version}, {seen} was seen before")
    return family


def mark(targets: Targets, role: str) -> str:
    """Return the name of a family's high-water mark: another once its keys were replaced (as TUF 5.3.11 for roots)."""
    keyids = sorted(targets.get_delegated_role(role).keyids)
    return f"{role}@{hashlib.sha256(' '.join(keyids).encode()).hexdigest()[:16]}"
