"""``model``, ``load``, ``unload``, ``ps``, ``bench``, ``cache``: models in memory and on the disk."""

from __future__ import annotations

import argparse
from typing import Any

from garrison_agent.cli.parsers.declare import add_command, add_group, add_model_name, late

_KEEP_ALIVE = "unload it after so long without requests: 10m, 1h, 0 (at once), -1 (never)"


def add_to(commands: Any) -> None:
    """Register the commands."""
    models = add_group(commands, "model", "list, inspect, load, and unload models")
    listing = add_command(
        models,
        "list",
        late("models", "list_models"),
        "list the models on this board",
        [
            "garrison-agent model list",
            "garrison-agent model list --filter device=cpu --filter 'name=qwen*'",
            "garrison-agent model list --filter 'license=!Apache-2.0' -o json",
        ],
        notes="A filter is key=value; ! before the value turns it round, * stands for any text, case does not count.\n"
        "Several filters must all hold. A wrong key lists the right ones. On a narrow terminal columns are left out.",
    )
    listing.add_argument(
        "--filter", metavar="KEY=VALUE", action="append", default=[], help="show only these; may be repeated"
    )
    info = add_command(
        models,
        "info",
        late("models", "show_model"),
        "show one model: variant, runtime, size, limits, gate, license",
        [
            "garrison-agent model info smollm2",
            "garrison-agent model info smollm2 --variants     which of its builds fit this board, or why not",
            "garrison-agent model info smollm2 --license",
        ],
    )
    add_model_name(info)
    what = info.add_mutually_exclusive_group()
    what.add_argument("--license", action="store_true", help="show only the license")
    what.add_argument("--variants", action="store_true", help="show each build, and whether it fits this board")
    _add_load(models, "garrison-agent model")
    _add_load(commands, "garrison-agent")
    add_command(
        commands,
        "ps",
        late("models", "show_loaded"),
        "show the models in memory: size, requests, speed, and until when",
        ["garrison-agent ps", "garrison-agent ps -o json"],
    )
    _add_bench(commands)
    _add_cache(commands)


def _add_load(commands: Any, program: str) -> None:
    load = add_command(
        commands,
        "load",
        late("models", "load_model"),
        "load a model and wait until it serves",
        [f"{program} load smollm2", f"{program} load smollm2 --keep-alive 10m"],
    )
    add_model_name(load)
    load.add_argument("--keep-alive", metavar="TIME", help=_KEEP_ALIVE)
    unload = add_command(
        commands,
        "unload",
        late("models", "unload_model"),
        "end a model's process and free its memory; the next request loads it again",
        [f"{program} unload smollm2"],
    )
    add_model_name(unload)


def _add_bench(commands: Any) -> None:
    bench = add_command(
        commands,
        "bench",
        late("bench", "run_bench"),
        "measure a model on this board: tokens a second, memory, temperature",
        [
            "garrison-agent bench smollm2                        pp512 and tg128, 5 times each",
            "garrison-agent bench smollm2 -p 256 -n 64 -r 3",
            "garrison-agent bench smollm2 --concurrent 4         and 4 answers at once",
            "garrison-agent bench smollm2 -o json                fields as llama-bench has them",
            "garrison-agent bench --history smollm2              what was measured before",
        ],
        notes="Method of llama-bench: after a warm-up, the time to read P random tokens (pp), and to write N (tg);\n"
        "mean and standard deviation. Tensor models: latency one by one, and requests a second with 8 at once.\n"
        "Results are kept in $XDG_STATE_HOME/garrison/bench.jsonl (default: ~/.local/state/garrison).",
    )
    add_model_name(bench, nargs="?")
    bench.add_argument("-p", "--prompt", metavar="P", type=_count, default=512, help="tokens to read (default: 512)")
    bench.add_argument(
        "-n",
        "--generate",
        metavar="N",
        type=_positive,
        help="tokens to write (default: 128); for tensors: requests in a repetition (default: 100)",
    )
    bench.add_argument("-r", "--repetitions", metavar="R", type=_positive, default=5, help="default: 5")
    bench.add_argument(
        "--concurrent",
        metavar="C",
        type=_positive,
        help="also measure so many answers at once; for tensors: requests in parallel (default: 8)",
    )
    bench.add_argument("--history", action="store_true", help="measure nothing; show earlier results and the change")


def _add_cache(commands: Any) -> None:
    cache = add_group(commands, "cache", "see, check, and clear installed model files")
    add_command(
        cache,
        "list",
        late("cache", "list_cache"),
        "list installed packages and their size",
        ["garrison-agent cache list"],
    )
    add_command(
        cache,
        "location",
        late("cache", "show_location"),
        "print the folder that holds model files",
        ["garrison-agent cache location"],
    )
    remove = add_command(
        cache,
        "remove",
        late("cache", "remove_from_cache"),
        "delete an installed package that nothing uses",
        ["garrison-agent cache remove smollm2:1.0.0"],
    )
    add_model_name(remove, text="package name, or <name>:<version>")
    verify = add_command(
        cache,
        "verify",
        late("cache", "verify_cache"),
        "read every file of installed packages and compare it with what was signed",
        ["garrison-agent cache verify", "garrison-agent cache verify smollm2 --repair"],
        notes="Exit status 1 if a file is damaged or missing, and was not repaired. A model's files are checked\n"
        "before every load anyway; this finds a failing disk earlier. Models go on serving meanwhile.",
    )
    add_model_name(verify, nargs="?", text="only this package: alias, package name, or <name>:<version>")
    verify.add_argument("--repair", action="store_true", help="fetch what is damaged or missing, chunk by chunk")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("not below 0")
    return value
