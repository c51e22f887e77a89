"""``run``, ``enroll``, ``status``, ``doctor``, ``logs``: the agent itself, and a person who talks to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from garrison_agent.cli.parsers.declare import add_command, add_model_name, late
from garrison_agent.cli.service import enroll, run


def add_to(commands: Any) -> None:
    """Register the commands."""
    _add_run(commands)
    _add_enroll(commands)
    add_command(
        commands,
        "status",
        late("status", "show_status"),
        "show what serves, connection, registry, outbox, and memory",
        ["garrison-agent status", "garrison-agent status -o json | jq .outbox"],
    )
    add_command(
        commands,
        "doctor",
        late("doctor", "run_doctor"),
        "check configuration, keys, certificate, clock, disk, engines, and the running agent",
        ["garrison-agent doctor", "garrison-agent doctor -o json"],
        notes="Exit status 1 if a check failed. Works while the agent is down.",
    )
    logs = add_command(
        commands,
        "logs",
        late("logs", "show_logs"),
        "show what the agent has logged, from the journal",
        [
            "garrison-agent logs                     the last 50 lines",
            "garrison-agent logs -f                  go on as they come; Ctrl-C ends",
            "garrison-agent logs --since '10 min ago'",
        ],
        notes="Needs systemd. Logs never hold prompts or answers.",
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on showing lines as they come")
    logs.add_argument("-n", "--lines", metavar="N", type=int, help="how many lines (default: 50; with --since: all)")
    logs.add_argument("--since", metavar="TIME", help="from this time on: '2026-11-24 08:00', '1 hour ago', today")


def _add_run(commands: Any) -> None:
    parser = add_command(
        commands,
        "run",
        run,
        "talk to a model; without a name: run the agent in the foreground (systemd does this)",
        [
            "garrison-agent run smollm2                          a conversation; /help lists what it knows",
            'garrison-agent run smollm2 "Name three rivers"      one answer, and end',
            "garrison-agent run smollm2 Summarize: < notes.txt   the prompt, then what is piped in",
            "garrison-agent run smollm2 Hello -o json            text, usage, and timings for a program",
            'garrison-agent run smollm2 "A town as JSON" --json-schema town.json',
            "garrison-agent run --config ./agent.toml            the agent itself, in the foreground",
        ],
        notes="Ctrl-C stops an answer; twice at an empty prompt, Ctrl-D, or /bye leaves. Prompts go to the model and\n"
        "nowhere else: what was typed is kept in a file only if GARRISON_HISTORY_FILE names one.",
    )
    add_model_name(parser, nargs="?", text="alias, package name, or <name>:<version>; none: run the agent itself")
    parser.add_argument("words", metavar="PROMPT", nargs="*", help="answer this and end; piped text is added")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--temperature", metavar="T", help="0 is always the likeliest word; up to 2")
    parser.add_argument("--top-p", metavar="P", help="above 0, up to 1")
    parser.add_argument("--seed", metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--max-tokens", metavar="N", help="end an answer after so many tokens")
    parser.add_argument("--json-schema", metavar="FILE", type=Path, help="answers are JSON that fits this schema")
    parser.add_argument("--keep-alive", metavar="TIME", help="how long the model stays loaded after: 5m, 1h, 0, -1")
    parser.add_argument("--verbose", action="store_true", help="say after each answer how fast it was")


def _add_enroll(commands: Any) -> None:
    enrolment = add_command(
        commands,
        "enroll",
        enroll,
        "make this board's keys and join a fleet",
        [
            "garrison-agent enroll STRING",
            "garrison-agent enroll - < string.txt                 keeps it out of the process list",
            "garrison-agent enroll STRING --name edge-7           the name that it would like, of a batch",
            "garrison-agent enroll STRING --no-wait               an invitation: ask, and come back later",
            "garrison-agent enroll --offline --out request.json   no network: carry this to an operator",
            "garrison-agent enroll --response response.json --root-sha256 DIGEST",
        ],
        notes="An operator prints the string with: garrison device token create NAME (or --batch), or garrison device\n"
        "invite. Whatever ends it, the same command goes on with the same keys.",
    )
    enrolment.add_argument(
        "string", metavar="STRING", nargs="?", help="the enrolment string; - reads it from standard input"
    )
    enrolment.add_argument(
        "--name", metavar="NAME", default="", help="what the board would like to be called, where the string is open"
    )
    enrolment.add_argument(
        "--no-wait", action="store_true", help="with an invitation: do not wait for approval, end with status 8"
    )
    enrolment.add_argument("--offline", action="store_true", help="write a request for an operator, without a network")
    enrolment.add_argument("--out", metavar="FILE", type=Path, help="with --offline: where to write the request")
    enrolment.add_argument("--response", metavar="FILE", type=Path, help="what the operator sent back")
    enrolment.add_argument(
        "--root-sha256", metavar="DIGEST", help="with --response: the digest of the root, as an operator told it"
    )
