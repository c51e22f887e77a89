"""``garrison-agent model list|info``, ``load``, ``unload``, and ``ps``."""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Callable, Sequence

from garrison_agent.api.commands import LoadResult, ModelView, RunningView, UnloadResult, VariantsView, VariantView
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.durations import parse_keep_alive
from garrison_agent.cli.output import duration, fold, pairs, print_json, size, table
from garrison_agent.cli.progress import Spinner
from garrison_agent.config import load_config
from garrison_protocol.errors import InvalidError, UnavailableError

_MIB = 1024 * 1024
_FILTERS: dict[str, Callable[[ModelView], str | bool | list[str]]] = {
    "alias": lambda view: view["alias"],
    "capability": lambda view: view["capabilities"],
    "device": lambda view: view["device_type"],
    "engine": lambda view: view["engine"],
    "id": lambda view: view["id"],
    "license": lambda view: view["license"],
    "loaded": lambda view: view["loaded"],
    "name": lambda view: view["name"],
    "provider": lambda view: view["execution_provider"],
    "publisher": lambda view: view["publisher"],
    "quantization": lambda view: view["quantization"],
    "serving": lambda view: view["serving"],
    "state": lambda view: view["state"],
    "task": lambda view: view["task"],
    "tools": lambda view: view["supports_tool_calling"],
    "variant": lambda view: view["variant"],
    "version": lambda view: view["version"],
}
_TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def list_models(arguments: argparse.Namespace) -> int:
    """Print every package that this board holds or is fetching, as far as the filters let it through."""
    filters = parse_filters(arguments.filter)
    all_views: list[ModelView] = _client(arguments).get("models")
    views = [view for view in all_views if all(matches(view) for matches in filters)]
    if arguments.output == "json":
        print_json(views)
    elif not all_views:
        print("no models are on this board")
    elif not views:
        print(f"none of the {len(all_views)} models on this board matches")
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
        print(table(heads, rows, right=["SIZE"], spare=["LICENSE", "SERVING", "TASK", "STATE"]))
    return 0


def parse_filters(texts: Sequence[str]) -> list[Callable[[ModelView], bool]]:
    """Return what tells whether a model passes each of the filters (``key=value``).

    Raises:
        InvalidError: ``cli.filter_invalid``.
    """
    return [_parse_filter(text) for text in texts]


def _parse_filter(text: str) -> Callable[[ModelView], bool]:
    key, equals, wanted = text.partition("=")
    key = key.strip().lower()
    if not equals or key not in _FILTERS:
        what = f"there is no key {key!r}" if equals else f"{text!r} is no key=value"
        raise InvalidError("cli.filter_invalid", what, hint=f"keys: {', '.join(_FILTERS)}")
    negated = wanted.startswith("!")
    pattern = wanted.removeprefix("!").strip().lower()
    value_of = _FILTERS[key]

    def matches(view: ModelView) -> bool:
        value = value_of(view)
        if isinstance(value, bool):
            if pattern not in _TRUTH:
                raise InvalidError("cli.filter_invalid", f"{key} is yes or no, not {pattern!r}", hint=f"{key}=yes")
            found = value is _TRUTH[pattern]
        else:
            values = value if isinstance(value, list) else [value]
            found = any(fnmatch.fnmatchcase(one.lower(), pattern) for one in values)
        return found is not negated

    return matches


def show_model(arguments: argparse.Namespace) -> int:
    """Print one package, its license, or which of its builds fit this board."""
    client = _client(arguments)
    if arguments.variants:
        return _show_variants(client.get("models", arguments.name, "variants"), arguments.output)
    view: ModelView = client.get("models", arguments.name)
    if arguments.output == "json":
        print_json(view)
    elif arguments.license:
        print(f"{view['id']}: {view['license']}")
        if view["license_description"]:
            print(view["license_description"])
    else:
        print(pairs(facts(view)))
    return 0


def _show_variants(view: VariantsView, output: str) -> int:
    if output == "json":
        print_json(view)
        return 0
    print(fold(f"{view['id']} on this board ({_board(view)}):", "  "))
    for variant in view["variants"]:
        print()
        print(_variant(variant))
    return 0


def _board(view: VariantsView) -> str:
    return (
        f"{view['architecture']}, {view['memory_mb']} MiB of memory, {view['memory_budget_mb']} of them for models, "
        f"{view['disk_free_mb']} MiB of disk free, engines: {', '.join(view['engines']) or 'none'}"
    )


def _variant(variant: VariantView) -> str:
    build = f"{variant['engine']} on {variant['device_type']} ({variant['execution_provider']})"
    if variant["chosen"]:
        verdict = "fits, and is the one this board takes"
    elif variant["fits"]:
        verdict = "fits; another one comes first"
    else:
        verdict = "does not fit"
    lines = [
        f"{variant['name']}: {verdict}",
        f"  {' '.join(part for part in (variant['quantization'], build) if part)}",
        f"  needs about {variant['memory_mb']} MiB of memory, {_disk(variant)}",
        *(f"  - {reason}" for reason in variant["reasons"]),
    ]
    return "\n".join(fold(line, "    ") for line in lines)


def _disk(variant: VariantView) -> str:
    whole = size(variant["size_bytes"])
    if not variant["missing_bytes"]:
        return f"{whole} of disk, which are here"
    return f"{whole} of disk, of which {size(variant['missing_bytes'])} are not here yet"


def load_model(arguments: argparse.Namespace) -> int:
    """Load a model and wait until it serves."""
    keep_alive_s = parse_keep_alive(arguments.keep_alive)
    return _print_outcome(arguments, load_and_wait(_client(arguments), arguments.name, keep_alive_s))


def load_and_wait(client: AgentClient, name: str, keep_alive_s: float | None = None) -> LoadResult:
    """Return once the model serves; a terminal shows that it is being loaded.

    Raises:
        GarrisonError: What loading failed with.
    """
    body = None if keep_alive_s is None else {"keep_alive_s": keep_alive_s}
    with Spinner(f"loading {name}"):
        while True:
            try:
                result: LoadResult = client.post("models", name, "load", body=body)
                return result
            except UnavailableError as error:
                if error.code != "model.loading":  # the agent answers after a while, and goes on loading
                    raise


def unload_model(arguments: argparse.Namespace) -> int:
    """End a model's worker, so that its memory is free; the next request loads it again."""
    with Spinner(f"unloading {arguments.name} once it has finished its answers"):
        result: UnloadResult = _client(arguments).post("models", arguments.name, "unload")
    return _print_outcome(arguments, result)


def show_loaded(arguments: argparse.Namespace) -> int:
    """Print the models in memory."""
    views: list[RunningView] = _client(arguments).get("loaded")
    if arguments.output == "json":
        print_json(views)
    elif not views:
        print("no model is in memory; the first request to one loads it")
    else:
        print(render_loaded(views, time.time()))
    return 0


def render_loaded(views: Sequence[RunningView], now: float) -> str:
    """Return the models in memory as people read it. ``now`` is Unix seconds."""
    rows = [
        (
            view["alias"],
            view["id"],
            size(view["size_bytes"]),
            f"{duration(now - view['loaded_since'])} ago",
            _until(view, now),
            view["active"],
            None if view["tokens_per_s"] is None else f"{view['tokens_per_s']:.1f}",
        )
        for view in views
    ]
    heads = ["ALIAS", "MODEL", "MEMORY", "LOADED", "UNTIL", "ACTIVE", "TOK/S"]
    return table(heads, rows, right=["MEMORY", "ACTIVE", "TOK/S"], spare=["LOADED", "MODEL"])


def _until(view: RunningView, now: float) -> str:
    if view["expires_at"] is None:
        return "pinned" if view["pinned"] else "stays"
    return f"in {duration(view['expires_at'] - now)}"


def _print_outcome(arguments: argparse.Namespace, result: LoadResult | UnloadResult) -> int:
    if arguments.output == "json":
        print_json(result)
    else:
        print(f"{result['alias']} ({result['id']}): {result['outcome'].replace('_', ' ')}")
    return 0


def facts(view: ModelView) -> list[tuple[str, object]]:
    """Return what there is to say of a model, by name."""
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
