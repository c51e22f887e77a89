from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from garrison_controller.cli.app import app, main


def commands(group: TyperGroup, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    context = group.make_context(None, [], resilient_parsing=True)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, TyperGroup):
            yield from commands(command, (*words, name))
        else:
            assert isinstance(command, TyperCommand)
            yield (*words, name), command


def root() -> TyperGroup:
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return command


OWN = [words for words, _ in commands(root()) if words[0] in {"access", "device", "serve"}]


def test_help_documents_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "Exit statuses: 0 done" in out
    assert "GARRISON_URL" in out


@pytest.mark.parametrize("words", OWN, ids=" ".join)
def test_every_command_has_help_with_an_example(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example: garrison" in out
    if words != ("serve", "run"):
        assert "--output" in out


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "list", "--no-such-option"]) == 2
    assert main(["device", "list", "-o", "yaml"]) == 2
    assert main(["access", "grant", "bob", "emperor"]) == 2
    assert "emperor" in capsys.readouterr().err


def test_an_error_ends_with_its_status_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("GARRISON_URL", "GARRISON_TOKEN", "GARRISON_CA"):
        monkeypatch.delenv(name, raising=False)
    assert main(["device", "list"]) == 7
    assert "hint: run `garrison access login" in capsys.readouterr().err
    assert main(["serve", "run", "--config", f"{tmp_path}/none.toml"]) == 4
    assert main(["device", "token", "create", "edge-1", "--label", "nonsense"]) == 2
