from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from garrison_controller.cli.app import app, main
from garrison_controller.cli.rollout import parse_group
from garrison_protocol.errors import InvalidError


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


def test_only_the_command_itself_installs_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out
    assert main(["device", "--help"]) == 0
    assert "--install-completion" not in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("garrison ")


def test_a_file_that_cannot_be_used_is_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("GARRISON_KEY_PASSPHRASE", "correct horse battery")
    assert main(["registry", "key", "generate", "rita", "--out", str(blocker / "keys")]) == 2
    assert "cli.file_unusable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "full"), "no space left (cli.disk_full)"),
        (OSError(errno.ENOSPC, "full", "source", None, "copy"), "no space left for copy (cli.disk_full)"),
    ],
)
def test_a_full_disk_is_named_without_a_traceback(
    error: OSError, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("garrison_controller.cli.client.ApiClient.from_environment", fail)
    assert main(["device", "list"]) == 9
    assert text in capsys.readouterr().err


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("garrison_controller.cli.client.ApiClient.from_environment", interrupt)
    assert main(["device", "list"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_token_is_not_asked_for_where_nobody_types(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GARRISON_TOKEN", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["access", "login", "--url", "https://127.0.0.1:1"]) == 2
    assert "usage.token_empty" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["canary", "=x", "a=", "a=0%", "a=101%"])
def test_a_malformed_group_is_refused_before_the_controller_is_asked(text: str) -> None:
    with pytest.raises(InvalidError, match=r"usage\.group_malformed"):
        parse_group(text)
