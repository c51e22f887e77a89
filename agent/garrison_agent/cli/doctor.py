"""``garrison-agent doctor``: what is wrong on this board, and what to do about it; works while the agent is down."""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from garrison_agent.api.commands import Check
from garrison_agent.api.trust_view import trust_checks
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.output import duration, fold, print_json
from garrison_agent.cli.stored_trust import read_trust
from garrison_agent.config import DEFAULT_PATH, AgentConfig, load_config
from garrison_protocol.errors import GarrisonError

_MIB = 1024 * 1024
_ENGINES = (("llama.cpp", "llama_cpp", "llama"), ("onnxruntime", "onnxruntime", "onnx"))
_SECRETS = ("identity.key", "tls.pem")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print every check; 1 if one failed."""
    checks = list(examine(arguments.config, time.time()))
    if arguments.output == "json":
        print_json(checks)
    else:
        width = max(len(check["name"]) for check in checks)
        for check in checks:
            indent = " " * (width + 8)
            print(fold(f"{check['outcome']:4}  {check['name'].ljust(width)}  {check['detail']}", indent))
            if check["fix"]:
                print(fold(f"{indent}fix: {check['fix']}", indent + " " * 5))
    return 1 if any(check["outcome"] == "fail" for check in checks) else 0


def examine(config_path: Path | None, now: float) -> Iterator[Check]:
    """Yield the checks. ``now`` is Unix seconds."""
    try:
        config = load_config(config_path)
    except GarrisonError as error:
        yield _fail("config", error.message, error.hint)
        return
    source = config_path or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    yield _ok("config", str(source) if source else f"defaults; there is no {DEFAULT_PATH}")
    yield from _guarded(_folders, config)
    yield from _guarded(lambda each: _identity(each, now), config)
    yield from _guarded(_disk, config)
    yield from _engines()
    yield from _agent(config, now)


def _guarded(check: Callable[[AgentConfig], Iterator[Check]], config: AgentConfig) -> Iterator[Check]:
    """Turn a folder that this user may not enter into a finding."""
    try:
        yield from check(config)
    except PermissionError as error:
        yield _warn("permission", f"{error.filename} cannot be read by this user", "run the command with sudo")


def _folders(config: AgentConfig) -> Iterator[Check]:
    for name, folder in (("state folder", config.state_dir), ("runtime folder", config.runtime_dir)):
        if not folder.is_dir() and folder == config.runtime_dir:
            yield _ok(name, f"{folder} is made when the agent starts")
        elif not folder.is_dir():
            yield _fail(name, f"there is no {folder}", f"create it, owned by the agent's user: mkdir -p {folder}")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield _warn(name, f"{folder} is not writable for this user", "run doctor as root or as the agent's user")
        else:
            yield _ok(name, str(folder))


def _identity(config: AgentConfig, now: float) -> Iterator[Check]:
    folder = config.state_dir / "identity"
    if not (folder / "device.json").is_file():
        yield _fail("identity", f"this board is not enrolled: no {folder / 'device.json'}", _ENROLL)
        return
    for name in _SECRETS:
        path = folder / name
        if not path.is_file():
            if name != "tls.pem":  # which `_certificate` looks at
                yield _fail(name, f"{path} is missing", _ENROLL)
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            yield _fail(name, f"{path} has mode {mode:04o}: others may read it", f"chmod 600 {path}")
        else:
            yield _ok(name, f"mode {mode:04o}")
    yield from _certificate(folder / "tls.pem", now)


def _certificate(path: Path, now: float) -> Iterator[Check]:
    from garrison_agent.adapters.certificates import read_certificate

    try:
        _, span = read_certificate(path.read_bytes())
    except FileNotFoundError:
        yield _fail("certificate", f"{path} is missing", _RENEW)
        return
    except ValueError:
        yield _fail("certificate", f"{path} is no PEM certificate", _RENEW)
        return
    start, end = span.start_s, span.end_s
    if now < start:
        yield _fail(
            "clock",
            f"the clock is {duration(start - now)} before the certificate's first second",
            "set the clock: timedatectl set-ntp true",
        )
        return
    yield _ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))
    if span.ended(now):
        yield _fail("certificate", f"expired {duration(now - end)} ago, so the broker refuses this board", _RENEW)
    elif now > (span.renew_at_s + end) / 2:
        yield _warn("certificate", f"expires in {duration(end - now)} and should have been renewed by now", _RENEW)
    else:
        when = span.renew_at_s - now
        renewal = f"renewed by itself in {duration(when)}" if when > 0 else "a renewal is due, by itself"
        yield _ok("certificate", f"valid for {duration(end - now)}, {renewal}")


def _disk(config: AgentConfig) -> Iterator[Check]:
    if not config.state_dir.is_dir():
        return
    free_mb = shutil.disk_usage(config.state_dir).free // _MIB
    reserve_mb = config.limits.disk_reserve_mb
    if free_mb < reserve_mb:
        yield _fail(
            "disk",
            f"{free_mb} MiB free, below the reserve of {reserve_mb} MiB: nothing new can be installed",
            "free space, for example with: garrison-agent cache remove NAME",
        )
    else:
        yield _ok("disk", f"{free_mb} MiB free, {reserve_mb} MiB kept in reserve")


def _engines() -> Iterator[Check]:
    for engine, module, extra in _ENGINES:
        if find_spec(module) is None:
            yield _warn(
                f"engine {engine}",
                "not installed; models that need it are rejected",
                f"pip install 'garrison[{extra}]'",
            )
        else:
            yield _ok(f"engine {engine}", "installed")


def _agent(config: AgentConfig, now: float) -> Iterator[Check]:
    try:
        own: list[Check] = AgentClient(config.socket_path).get("doctor")
    except GarrisonError as error:
        yield _fail("agent", error.message, error.hint)
        view = read_trust(config.database_path, now)
        yield from trust_checks(view) if view is not None else ()
        return
    yield _ok("agent", f"answers on {config.socket_path}")
    yield from (check for check in own if check["name"] != "disk")  # looked at already, also while the agent is down


_RENEW = "let the agent run and reach its controller: it renews by itself; `renewal` says what went wrong"
_ENROLL = "ask an operator for an enrolment string, then: garrison-agent enroll STRING"


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, outcome="ok", detail=detail, fix="")


def _warn(name: str, detail: str, fix: str) -> Check:
    return Check(name=name, outcome="warn", detail=detail, fix=fix)


def _fail(name: str, detail: str, fix: str) -> Check:
    return Check(name=name, outcome="fail", detail=detail, fix=fix)
