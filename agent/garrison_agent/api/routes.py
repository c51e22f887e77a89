"""Which worker answers to which name: an immutable snapshot that requests read without a lock.

The owner thread builds a new ``RouteTable`` after every change and swaps one reference; a request that has read the
old one finishes with the old worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from garrison_protocol.manifest import Manifest, PackageRef, Variant
from garrison_protocol.states import Engine


@dataclass(frozen=True)
class Route:
    """One alias in service. ``socket`` is the worker's unix socket; None: installed, but not loaded."""

    alias: str
    model_id: str
    """``<name>:<version>``."""
    engine: Engine
    socket: Path | None
    package: PackageRef
    manifest: Manifest
    variant: Variant
    state: str
    loaded: bool
    barred: bool = False
    """Its lease has run out: it is not loaded again before fresh metadata comes."""
    failure: str | None = None
    """Why its worker failed, once it has done so too often to be started for a request."""

    @property
    def names(self) -> tuple[str, str, str]:
        """Every name that clients may use for it, the most specific intent first."""
        return self.alias, self.model_id, self.package.name


@dataclass(frozen=True)
class RouteTable:
    """All aliases in service at one moment."""

    routes: tuple[Route, ...] = ()

    def find(self, name: str) -> Route | None:
        """Return the route called ``name``: by alias, then model id, then package name; loaded ones first."""
        for place in range(3):
            matches = [route for route in self.routes if route.names[place] == name]
            if matches:
                return next((route for route in matches if route.socket is not None), matches[0])
        return None

    @property
    def names(self) -> list[str]:
        """The aliases and model ids, for messages."""
        return [name for route in self.routes for name in (route.alias, route.model_id)]
