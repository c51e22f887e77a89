"""Whether a package fits on the disk, and which installed ones must go for it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class InstalledBlob:
    """The blobs that one installed package keeps on the disk; packages may share blobs."""

    package: str
    """What to call it: ``name:version``."""
    digests: Mapping[str, int]
    """Size in bytes by SHA-256."""
    last_used: int
    """Unix seconds."""
    protected: bool
    """Serving, wanted, or the one to roll back to: never removed."""


@dataclass(frozen=True)
class Fits:
    """There is room already."""


@dataclass(frozen=True)
class Evict:
    """Removing these packages makes room; ``digests`` are the blobs that nobody else holds then."""

    packages: tuple[InstalledBlob, ...]
    digests: tuple[str, ...]
    freed_bytes: int


@dataclass(frozen=True)
class Refuse:
    """Even without everything removable, this many bytes are missing."""

    missing_bytes: int


def plan_space(
    needed_bytes: int, free_bytes: int, reserve_bytes: int, installed: Sequence[InstalledBlob]
) -> Fits | Evict | Refuse:
    """Return how ``needed_bytes`` more can be stored with ``reserve_bytes`` left over.

    The least recently used go first, and none goes without need. ``needed_bytes`` counts what is not here yet.
    """
    short = needed_bytes + reserve_bytes - free_bytes
    if short <= 0:
        return Fits()
    chosen: list[InstalledBlob] = []
    for candidate in sorted((blob for blob in installed if not blob.protected), key=lambda blob: blob.last_used):
        chosen.append(candidate)
        if _freed(chosen, installed)[1] >= short:
            break
    else:
        return Refuse(short - _freed(chosen, installed)[1])
    for candidate in reversed(chosen[:-1]):  # the last one may have made an earlier one needless
        rest = [blob for blob in chosen if blob is not candidate]
        if _freed(rest, installed)[1] >= short:
            chosen = rest
    digests, freed_bytes = _freed(chosen, installed)
    return Evict(tuple(chosen), digests, freed_bytes)


def _freed(gone: Sequence[InstalledBlob], installed: Sequence[InstalledBlob]) -> tuple[tuple[str, ...], int]:
    holders = Counter(digest for blob in installed for digest in blob.digests)
    holders.subtract(digest for blob in gone for digest in blob.digests)
    sizes = {digest: size for blob in gone for digest, size in blob.digests.items() if holders[digest] == 0}
    return tuple(sorted(sizes)), sum(sizes.values())
