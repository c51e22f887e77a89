"""``garrison-agent model list|info|load|unload``."""

from __future__ import annotations

import argparse

from garrison_agent.api.commands import LoadResult, ModelView, UnloadResult
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.output import pairs, print_json, size, table
from garrison_agent.config import load_config

_MIB = 1024 * 1024


def list_models(arguments: argparse.Namespace) -> int:
    """Print every package that this board holds or is fetching."""
    views: list[ModelView] = _client(arguments).get("models")
    if arguments.output == "json":
        print_json(views)
    elif not views:
        print("no models are on this board")
    else:
        rows = [
            (
                view["alias"],
                view["id"],
                view["state"],
                view["serving"],
                view["loaded"],
                view["task"],
                view["license"],
                _size(view),
            )
            for view in views
        ]
        heads = ["ALIAS", "MODEL", "STATE", "SERVING", "LOADED", "TASK", "LICENSE", "SIZE"]
        print(table(heads, rows, right=["SIZE"]))
    return 0


def show_model(arguments: argparse.Namespace) -> int:
    """Print one package, or its license."""
    view: ModelView = _client(arguments).get("models", arguments.name)
    if arguments.output == "json":
        print_json(view)
    elif arguments.license:
        print(f"{view['id']}: {view['license']}")
        if view["license_description"]:
            print(view["license_description"])
    else:
        print(pairs(_facts(view)))
    return 0


def load_model(arguments: argparse.Namespace) -> int:
    """Load a model and wait until it serves."""
    result: LoadResult = _client(arguments).post("models", arguments.name, "load")
    return _print_outcome(arguments, result)


def unload_model(arguments: argparse.Namespace) -> int:
    """End a model's worker, so that its memory is free; the next request loads it again."""
    result: UnloadResult = _client(arguments).post("models", arguments.name, "unload")
    return _print_outcome(arguments, result)


def _print_outcome(arguments: argparse.Namespace, result: LoadResult | UnloadResult) -> int:
    if arguments.output == "json":
        print_json(result)
    else:
        print(f"{result['alias']} ({result['id']}): {result['outcome'].replace('_', ' ')}")
    return 0


def _facts(view: ModelView) -> list[tuple[str, object]]:
    tools = "yes" if view["supports_tool_calling"] else "no"
    return [
        ("id", view["id"]),
        ("alias", view["alias"]),
        ("display name", view["display_name"]),
        ("publisher", view["publisher"]),
        ("license", view["license"]),
        ("task", view["task"]),
        ("state", view["state"]),
        ("serving", view["serving"]),
        ("loaded", view["loaded"]),
        ("variant", " ".join(part for part in (view["variant"], view["quantization"]) if part)),
        ("runtime", f"{view['engine']} on {view['device_type']} ({view['execution_provider']})"),
        ("size", _size(view)),
        ("memory", f"about {view['memory_mb']} MiB"),
        ("parameters", f"{view['parameter_count']:,}" if view["parameter_count"] else None),
        ("context", f"{view['context_length']} tokens" if view["context_length"] else None),
        ("max output", f"{view['max_output_tokens']} tokens" if view["max_output_tokens"] else None),
        ("tool calling", tools),
        ("input", ", ".join(view["input_modalities"])),
        ("output", ", ".join(view["output_modalities"])),
        ("capabilities", ", ".join(view["capabilities"])),
        ("gate", f"{view['evaluation_cases']} cases, accuracy at least {view['min_accuracy']:.2f}"),
        ("manifest", f"sha256 {view['manifest_sha256']}"),
    ]


def _size(view: ModelView) -> str:
    return size(int(view["file_size_mb"] * _MIB))


def _client(arguments: argparse.Namespace) -> AgentClient:
    return AgentClient(load_config(arguments.config).socket_path)
