"""What the local API serves, read from the very code that registers it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from garrison_agent.api import app
from garrison_agent.api.access import ModelAccess
from garrison_agent.api.app import LocalApp, TcpRules
from garrison_agent.api.asgi import Handler, RouteBook
from garrison_agent.core.applications import ApplicationTable
from tests.fakes.local_owner import LocalOwner


@dataclass(frozen=True)
class Served:
    """One registration: a path with ``{parameters}``, and the methods that its one handler takes."""

    methods: tuple[str, ...]
    path: str

    def serves(self, method: str, path: str) -> bool:
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(self.path))
        return method in self.methods and re.fullmatch(pattern, path) is not None


class _Recorder(RouteBook):
    """Writes down what is added, rare surfaces as well."""

    served: list[Served]

    def __init__(self) -> None:
        super().__init__()
        type(self).served = []

    def add(self, methods: str, path: str, handler: Handler) -> None:
        self.served.append(Served(tuple(methods.split()), path))

    def add_rare(self, pattern: str, register: Callable[[RouteBook], None]) -> None:
        before = len(self.served)
        register(self)
        for route in self.served[before:]:
            assert re.fullmatch(pattern, route.path.replace("{", "").replace("}", "")), (
                f"{route.path} is registered by a request to {pattern}, which does not match it"
            )


def served() -> list[Served]:
    """Return every registration of the local API."""
    owner = LocalOwner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "RouteBook", _Recorder)
        access = ModelAccess(owner.read, owner.post)
        LocalApp(access, Path("agent.sock"), list, applications=ApplicationTable, tcp=TcpRules())
    return list(_Recorder.served)
