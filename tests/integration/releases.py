"""A release folder with every signer's keys, and a controller that publishes what they sign, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from garrison_controller.cli.app import app
from garrison_protocol.errors import GarrisonError
from tests.fakes.ceremony import PASSPHRASE, draft
from tests.integration.controllers import Served, served_controller


@dataclass
class Release:
    """A release folder, and the ``garrison`` command in it."""

    served: Served
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str, stdin: str = "") -> Any:
        """Run one command and return its JSON; a ``GarrisonError`` comes as it is."""
        result = CliRunner().invoke(app, [*words, "-o", "json"], input=stdin, env=self.environment)
        if isinstance(result.exception, GarrisonError):
            raise result.exception
        assert result.exit_code == 0, (words, result.output, result.exception)
        return json.loads(result.stdout)

    def text(self, *words: str, stdin: str = "") -> tuple[str, str]:
        """Run one command and return what it prints to people: standard output and standard error."""
        result = CliRunner().invoke(app, list(words), input=stdin, env=self.environment)
        assert result.exit_code == 0, (words, result.output, result.exception)
        return result.stdout, result.stderr

    def fails(self, *words: str, stdin: str = "") -> GarrisonError:
        """Run one command and return its error."""
        with pytest.raises(GarrisonError) as caught:
            self.run(*words, stdin=stdin)
        return caught.value

    def key(self, name: str) -> str:
        return str(self.folder / "keys" / f"{name}.key")

    def public(self, name: str) -> str:
        return str(self.folder / "keys" / f"{name}.pub.json")

    @property
    def workspace(self) -> str:
        return str(self.folder / "release")

    def sign(self, name: str) -> Any:
        return self.run("registry", "sign", "--workspace", self.workspace, "--key", self.key(name), "--yes")

    def pack(self, name: str, version: str, content: bytes) -> str:
        source, manifest = self.folder / f"{name}-{version}.gguf", self.folder / f"{name}-{version}.json"
        source.write_bytes(content)
        manifest.write_bytes(draft(name, version))
        out = str(self.folder / f"{name}-{version}")
        self.run("model", "pack", "--manifest", str(manifest), "--file", f"model.gguf={source}", "--out", out)
        return out


@contextmanager
def published_release(folder: Path) -> Iterator[Release]:
    """Hold the ceremony against a running controller: root 2 of 3, targets 2 of 2, no models."""
    with served_controller(folder) as served:
        (served.controller.config.metadata_dir / "1.root.json").unlink()
        served.principal("paula", "model-publisher").close()
        token = served.admin.post("/api/v1/access/tokens", {"principal": "paula"})["token"]
        release = Release(served, folder)
        release.environment = {
            "GARRISON_URL": served.url,
            "GARRISON_TOKEN": token,
            "GARRISON_CA": str(served.ca),
            "GARRISON_KEY_PASSPHRASE": PASSPHRASE,
        }
        for name in ("alice", "bob", "carol", "dan", "erin"):
            release.run("registry", "key", "generate", name, "--out", str(folder / "keys"))
        roots = [word for name in ("alice", "bob", "carol") for word in ("--root-key", release.public(name))]
        targets = [word for name in ("dan", "erin") for word in ("--targets-key", release.public(name))]
        online = str(served.controller.config.state_dir / "online.json")
        words = ("registry", "init", "--workspace", release.workspace, "--online", online, "--fleet", "demo")
        thresholds = ("--root-threshold", "2", "--targets-threshold", "2")
        release.run(*words, *roots, *targets, *thresholds)
        for name in ("alice", "dan", "erin"):
            release.sign(name)
        refused = release.fails("registry", "push", "--workspace", release.workspace)
        assert refused.code == "registry.threshold_unmet"
        assert release.sign("bob")["pending"][0]["complete"]
        answer = release.run("registry", "push", "--workspace", release.workspace)
        versions = {role: answer[role] for role in ("root", "targets", "snapshot", "timestamp")}
        assert versions == {"root": 1, "targets": 1, "snapshot": 1, "timestamp": 1}
        assert (answer["packages"], answer["unchanged"]) == ([], False)
        yield release
