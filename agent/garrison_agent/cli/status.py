"""``garrison-agent status``."""

from __future__ import annotations

import argparse
import time

from garrison_agent.api.commands import AliasStatus, CertificateStatus, StatusView, TrustView, UpstreamView
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.output import duration, fold, moment, pairs, print_json, size, table
from garrison_agent.config import load_config
from garrison_agent.core.trust_report import day


def show_status(arguments: argparse.Namespace) -> int:
    """Print what the running agent says about itself."""
    view: StatusView = AgentClient(load_config(arguments.config).socket_path).get("status")
    if arguments.output == "json":
        print_json(view)
    else:
        print(render(view, time.time()))
    return 0


def render(view: StatusView, now: float) -> str:
    """Return the status as people read it. ``now`` is Unix seconds."""
    registry, desired, cache = view["registry"], view["desired"], view["cache"]
    digest = desired["sha256"]
    blocks = [
        pairs(
            [
                ("device", view["device"]),
                ("agent", f"{view['version']}, pid {view['pid']}, up {duration(now - view['started_at'])}"),
                ("broker", _broker(view)),
                ("certificate", _certificate(view["certificate"], now)),
                (
                    "registry",
                    f"{registry['freshness']} (root {registry['root']}, timestamp {registry['timestamp']}, "
                    f"snapshot {registry['snapshot']}, targets {registry['targets']})",
                ),
                ("time", _time(view["trust"])),
                ("desired", f"counter {desired['counter']}" + (f", sha256 {digest[:12]}..." if digest else "")),
                ("memory", _memory(view["health"])),
                ("disk", f"models {cache['used_mb']} MiB, free {cache['free_mb']} MiB"),
                ("refused", ", ".join(f"{code} {count}" for code, count in sorted(view["refused"].items())) or "none"),
            ]
        ),
        _aliases(view["aliases"]),
        *([_upstreams(view["upstreams"])] if view.get("upstreams") else []),
        *([_leases(view["trust"])] if view["trust"]["leases"] else []),
        _trust(view["trust"]),
        table(
            ["STREAM", "EPOCH", "LAST", "ACKED", "PENDING"],
            [
                (name, stream["epoch"], stream["last"], stream["acked"], stream["pending"])
                for name, stream in sorted(view["outbox"].items())
            ],
            right=["LAST", "ACKED", "PENDING"],
        ),
    ]
    failures = [_failure(alias) for alias in view["aliases"] if alias["error_code"]]
    failures += [
        f"{alias['alias']}: its worker is {alias['worker']}: {alias['worker_failure']}"
        for alias in view["aliases"]
        if alias["worker"] in ("backoff", "failed") and alias["worker_failure"]
    ]
    return "\n\n".join(blocks + (["\n".join(failures)] if failures else []))


def _broker(view: StatusView) -> str:
    if not view["broker"]:
        return "none: this board is not enrolled (garrison-agent enroll)"
    if view["connected"]:
        return f"{view['broker']}, connected"
    return f"{view['broker']}, not connected" + (f": {view['broker_error']}" if view["broker_error"] else "")


def _time(trust: TrustView) -> str:
    state = ("" if trust["anchored"] else "not ") + "told by the controller since the start"
    return f"{day(trust['judged_at'])}, {state}; not before {day(trust['floor'])}"


def _trust(trust: TrustView) -> str:
    refuses = trust["refuses"] or ["nothing that is signed, newer, and meant for this board"]
    return "\n".join(["this board would refuse today:", *(fold(f"  {sentence}", "  ") for sentence in refuses)])


def _certificate(certificate: CertificateStatus, now: float) -> str:
    end, renew_at = certificate["not_after"], certificate["renew_at"]
    if end is None or renew_at is None:
        text = "none that can be used; the agent asks for a new one"
    elif certificate["ended"]:
        text = f"expired on {moment(end)}; the agent asks for a new one"
    else:
        renewal = f"renewed from {moment(renew_at)} on" if now < renew_at else "renewal is due"
        text = f"until {moment(end)}, {renewal}"
    if certificate["error_code"]:
        text += f"; {certificate['failed']} tries failed: {certificate['error_message']} ({certificate['error_code']})"
    return text


def _memory(health: dict[str, int]) -> str:
    parts = []
    if "rss_mb" in health:
        parts.append(f"agent {health['rss_mb']} MiB")
    if "mem_used_mb" in health and "mem_total_mb" in health:
        parts.append(f"board {health['mem_used_mb']} of {health['mem_total_mb']} MiB used")
    return ", ".join(parts) or "not measured yet"


def _aliases(aliases: list[AliasStatus]) -> str:
    if not aliases:
        return "no models are assigned to this board"
    rows = [
        (
            alias["alias"],
            alias["package"],
            _state(alias),
            alias["loaded"],
            alias["serving"],
            moment(alias["serving_since"]),
            alias["endpoint"],
        )
        for alias in aliases
    ]
    return table(["ALIAS", "PACKAGE", "STATE", "LOADED", "SERVING", "SINCE", "ENDPOINT"], rows)


def _upstreams(upstreams: list[UpstreamView]) -> str:
    rows = [(one["alias"], one["model"], one["url"], one["state"], one["detail"]) for one in upstreams]
    return table(["UPSTREAM, NOT VERIFIED", "MODEL", "URL", "STATE", "DETAIL"], rows)


def _leases(trust: TrustView) -> str:
    rows = [
        (one["alias"], one["model"], day(one["ends_at"]), one["on_expiry"], one["ended"]) for one in trust["leases"]
    ]
    return table(["ALIAS", "MODEL", "LEASE UNTIL", "THEN", "ENDED"], rows)


def _state(alias: AliasStatus) -> str:
    done, total = alias["progress_bytes"], alias["total_bytes"]
    if alias["state"] == "DOWNLOADING" and total:
        return f"DOWNLOADING {100 * done // total} % of {size(total)}"
    return alias["state"]


def _failure(alias: AliasStatus) -> str:
    return f"{alias['alias']}: {alias['error_message'] or alias['state']} ({alias['error_code']})"
