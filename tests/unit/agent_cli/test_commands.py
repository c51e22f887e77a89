from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from garrison_agent.api.commands import (
    Command,
    ListCache,
    ListModels,
    LoadModel,
    RemoveFromCache,
    UnloadModel,
    model_view,
    unknown_model,
)
from garrison_agent.cli.main import _parse, build_parser, main
from garrison_protocol.errors import ConflictError, RefusedError
from tests.fakes.local_owner import DIGEST, make_manifest
from tests.unit.agent_cli.conftest import Serve

VIEW = model_view(
    make_manifest(),
    make_manifest().variants[0],
    alias="chat",
    manifest_sha256=DIGEST,
    state="ACTIVE",
    serving=True,
    loaded=True,
)
CACHE = {
    "location": "/var/lib/garrison/blobs",
    "used_mb": 87,
    "free_mb": 900,
    "entries": [
        {
            "id": "smollm2:1.0.0",
            "variant": "cpu-q4",
            "size_bytes": 91226112,
            "state": "serving",
            "in_use": True,
            "path": "/var/lib/garrison/models/smollm2/1.0.0",
        }
    ],
}


def answer(command: Command) -> object:
    match command:
        case ListModels():
            return [VIEW]
        case LoadModel("broken"):
            return RefusedError("model.digest_mismatch", "model.bin is not what was signed", hint="wait for the repair")
        case LoadModel(name) | UnloadModel(name) if name not in ("chat", "smollm2"):
            return unknown_model(name, ["chat", "smollm2:1.0.0"])
        case LoadModel():
            return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "already_loaded"}
        case UnloadModel():
            return {"id": "smollm2:1.0.0", "alias": "chat", "outcome": "unloaded"}
        case ListCache():
            return CACHE
        case RemoveFromCache("old:1"):
            return {"id": "old:1", "freed_bytes": 91226112}
        case RemoveFromCache():
            return ConflictError("cache.in_use", "smollm2:1.0.0 serves")
        case _:
            raise AssertionError(command)


def run(config: Path, *words: str) -> int:
    return main([*words, "--config", str(config)])


def test_models(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = serve(answer)
    assert run(config, "model", "list") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["ALIAS", "MODEL", "STATE", "SERVING", "LOADED", "TASK", "LICENSE", "SIZE"]
    assert out.splitlines()[1].endswith("3.0 MiB")
    assert run(config, "model", "list", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == [VIEW]
    assert run(config, "model", "info", "smollm2") == 0
    out = capsys.readouterr().out
    assert "llama.cpp on CPU" in out
    assert "134,515,008" in out
    assert "1 cases, accuracy at least 0.80" in out
    assert run(config, "model", "info", "chat", "--license") == 0
    assert capsys.readouterr().out == "smollm2:1.0.0: Apache-2.0\nUse it, keep the notice.\n"
    assert run(config, "model", "load", "chat") == 0
    assert run(config, "model", "unload", "smollm2") == 0
    assert capsys.readouterr().out == "chat (smollm2:1.0.0): already loaded\nchat (smollm2:1.0.0): unloaded\n"
    assert owner.commands[-2:] == [LoadModel("chat"), UnloadModel("smollm2")]


def test_the_agents_errors_keep_their_exit_status(
    serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(answer)
    for words, status in (
        (("model", "info", "nobody"), 4),
        (("model", "load", "nobody"), 4),
        (("model", "load", "broken"), 6),
        (("cache", "remove", "smollm2"), 5),
    ):
        assert run(config, *words) == status
    err = capsys.readouterr().err
    assert "known here: chat, smollm2:1.0.0" in err
    assert "(model.digest_mismatch)\nhint: wait for the repair" in err


def test_a_name_with_odd_letters_is_only_a_name(serve: Serve, config: Path) -> None:
    owner = serve(answer)
    assert run(config, "model", "load", "a b?c#d%2e") == 4
    assert owner.commands == [LoadModel("a b?c#d%2e")]


def test_cache(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(answer)
    assert run(config, "cache", "list") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:5] == ["smollm2:1.0.0", "cpu-q4", "87", "MiB", "serving"]
    assert out.splitlines()[-1] == "/var/lib/garrison/blobs: 87 MiB used, 900 MiB free"
    assert run(config, "cache", "remove", "old:1") == 0
    assert capsys.readouterr().out == "removed old:1, 87 MiB freed\n"


def test_cache_location_needs_no_agent(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "cache", "location") == 0
    assert capsys.readouterr().out == f"{config.parent}/state/blobs\n"


def test_an_agent_that_is_down_or_closes_at_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config.parent / "run" / "agent.sock"
    assert run(config, "status") == 8
    err = capsys.readouterr().err
    assert f"the agent is not running at {path}" in err
    assert "garrison-agent run" in err
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert run(config, "status") == 8  # a stale file: nobody listens
        assert "agent.not_running" in capsys.readouterr().err
        listener.listen()

        def close_at_once() -> None:
            listener.accept()[0].close()

        closing = threading.Thread(target=close_at_once)
        closing.start()
        assert run(config, "status", "-o", "json") == 8
        closing.join()
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "agent.connection_lost"


def test_a_configuration_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--config", str(tmp_path / "none.toml")]) == 4
    assert "--config" in capsys.readouterr().err


def test_every_command_explains_itself_with_examples() -> None:
    words = [
        ["run"],
        ["load"],
        ["unload"],
        ["ps"],
        ["bench"],
        ["logs"],
        ["cache", "verify"],
        ["enroll"],
        ["status"],
        ["model", "list"],
        ["model", "info"],
        ["model", "load"],
        ["model", "unload"],
        ["cache", "list"],
        ["cache", "location"],
        ["cache", "remove"],
        ["doctor"],
        ["completion"],
    ]
    for command in words:
        with pytest.raises(SystemExit) as done:
            build_parser().parse_args([*command, "--help"])
        assert done.value.code == 0


@pytest.mark.parametrize("words", [[], ["model"], ["cache"], ["nothing"], ["model", "load"], ["status", "-o", "xml"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert "usage: garrison-agent" in capsys.readouterr().err


def test_help_shows_examples_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["model", "info", "--help"], ["doctor", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "examples:\n  garrison-agent " in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for word in ("garrison-agent", "unload", "doctor", "--license"):
        assert word in out


def test_an_empty_enrolment_string(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "enroll", "") == 2
    assert "enrolment.empty" in capsys.readouterr().err


def test_every_command_that_is_loaded_late_exists() -> None:
    def commands(parser: argparse.ArgumentParser) -> Iterator[object]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for one in action.choices.values():
                    yield from commands(one)
        if (command := parser.get_default("command")) is not None:
            yield command

    late = [cell.cell_contents for one in commands(build_parser()) for cell in getattr(one, "__closure__", None) or ()]
    pairs = list(zip(late[::2], late[1::2], strict=True))
    assert len(pairs) >= 11
    for module, name in pairs:
        assert callable(getattr(import_module(f"garrison_agent.cli.{module}"), str(name)))


def every_parser(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from every_parser(one)


def test_help_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    wide = [
        line
        for parser in every_parser(build_parser())
        for line in parser.format_help().splitlines()
        if len(line) > 80 and not line.startswith("  garrison-agent ")  # one long command is typed as one line
    ]
    assert wide == []


def test_a_prompts_words_may_stand_behind_options() -> None:
    arguments = _parse(["run", "smollm2", "two", "--temperature", "0", "more", "words", "-o", "json"])
    assert (arguments.name, arguments.words, arguments.output) == ("smollm2", ["two", "more", "words"], "json")
    for words in (["run", "smollm2", "--nope", "x"], ["status", "x"]):
        with pytest.raises(SystemExit) as wrong:
            _parse(words)
        assert wrong.value.code == 2


def test_run_without_a_name_is_the_agent_and_takes_none_of_a_conversations_options(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Path] = []

    def run_agent(arguments: argparse.Namespace) -> int:
        ran.append(arguments.config)
        return 0

    monkeypatch.setattr("garrison_agent.cli.service.run_agent", run_agent)
    assert run(config, "run") == 0
    assert ran == [config]
    assert run(config, "run", "--seed", "1") == 2
    assert "cli.model_missing" in capsys.readouterr().err
    assert len(ran) == 1


def test_the_agent_itself_keeps_none_of_these_commands_in_memory() -> None:
    code = "import sys; from garrison_agent.cli.main import _parse; _parse(['run']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("garrison_agent.cli.")}
    assert {name for name in ours if "parsers" not in name} == {"garrison_agent.cli.main", "garrison_agent.cli.service"}
