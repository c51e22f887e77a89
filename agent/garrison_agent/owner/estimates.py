"""What models take in memory on this board: measured, kept over restarts, and asked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from garrison_agent.adapters.database import Database
from garrison_agent.core.estimate import Measured, estimate_mb, learn, limit_mb
from garrison_agent.owner.shelf import Shelf
from garrison_protocol.errors import InsufficientError
from garrison_protocol.manifest import Manifest, PackageRef, Variant

MAX_MEASURED = 64
"""Variants whose measurements are kept; the oldest go first."""
_KEY = "memory.measured"

Context = Callable[[Manifest, Variant], int]
"""Returns how many tokens of context a worker of the variant will hold here, all sequences together."""


class Estimates:
    """Owner thread only. Losing the measurements does no harm: the manifests' numbers stand in until the next load."""

    def __init__(self, database: Database, shelf: Shelf, context: Context, budget_mb: int) -> None:
        self._database = database
        self._shelf = shelf
        self._context = context
        self._budget_mb = budget_mb
        self._measured = _read(database.get(_KEY))

    def need_mb(self, package: PackageRef, variant_name: str) -> int:
        """Return what a worker of the variant will take, in MiB.

        What was measured never keeps out of the budget what its manifest lets in: it has run here.

        Raises:
            GarrisonError: The package's manifest is not on this disk, or damaged.
        """
        manifest, variant = self._shelf.variant(package, variant_name)
        measured, tokens = self.measured(package, variant_name), self._context(manifest, variant)
        prior_mb = estimate_mb(variant.memory_mb, variant.size_bytes, tokens, None)
        needed_mb = estimate_mb(variant.memory_mb, variant.size_bytes, tokens, measured)
        return min(needed_mb, max(self._budget_mb, prior_mb))

    def tokens(self, package: PackageRef, variant_name: str) -> int:
        """Return the context that a worker of the variant will hold. Raises as ``need_mb``."""
        return self._context(*self._shelf.variant(package, variant_name))

    def measured(self, package: PackageRef, variant_name: str) -> Measured | None:
        """Return what is known of the variant from earlier loads, or None."""
        return self._measured.get(_name(package, variant_name))

    def limit_mb(self, package: PackageRef, variant_name: str) -> int:
        """Return the memory at which a worker of the variant is ended, in MiB. Raises as ``need_mb``."""
        return limit_mb(self.need_mb(package, variant_name), self._budget_mb, self.measured(package, variant_name))

    def learn(self, package: PackageRef, variant_name: str, now: Measured) -> None:
        """Take in a measurement, and keep it if it says something new."""
        name = _name(package, variant_name)
        before = self._measured.get(name)
        known = learn(before, now)
        if known == before:
            return
        self._measured.pop(name, None)  # the newest stands last
        self._measured[name] = known
        for oldest in list(self._measured)[:-MAX_MEASURED]:
            del self._measured[oldest]
        try:
            self._database.put(_KEY, _write(self._measured), spare=True)
        except InsufficientError:
            return  # a full disk: it is known as long as the agent runs


def _name(package: PackageRef, variant_name: str) -> str:
    return f"{package.manifest_sha256}/{variant_name}"


def _write(measured: dict[str, Measured]) -> str:
    return json.dumps({name: asdict(one) for name, one in measured.items()}, separators=(",", ":"))


def _read(text: str | None) -> dict[str, Measured]:
    try:
        return {name: Measured(**facts) for name, facts in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # of another version; it is measured again
