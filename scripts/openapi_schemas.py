"""JSON schemas of the local API's bodies: from the workers' models and the agent's typed dictionaries.

Only the document's writer (``scripts/openapi.py``) imports this.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from garrison_agent.api.applications import _NewApp
from garrison_agent.runtimes.embeddings.requests import EmbeddingRequest, OllamaEmbedRequest, OllamaOlderRequest
from garrison_agent.runtimes.ollama import requests as ollama_requests
from garrison_agent.runtimes.openai import chat_requests
from garrison_agent.runtimes.openai.requests import CompletionRequest
from garrison_agent.runtimes.openai.responses_requests import ResponseRequest
from garrison_protocol.manifest import Manifest

Schema = dict[str, Any]

REFS = "#/components/schemas/"
REQUESTS: dict[str, type[BaseModel]] = {
    "ChatRequest": chat_requests.ChatRequest,
    "CompletionRequest": CompletionRequest,
    "EmbeddingRequest": EmbeddingRequest,
    "ResponseRequest": ResponseRequest,
    "OllamaChatRequest": ollama_requests.ChatRequest,
    "OllamaGenerateRequest": ollama_requests.GenerateRequest,
    "OllamaEmbedRequest": OllamaEmbedRequest,
    "OllamaOlderEmbeddingRequest": OllamaOlderRequest,
    "NewApplication": _NewApp,
}
"""What its component is called -> the model that checks it."""
_TO_LOAD = {"OllamaChatRequest": "messages", "OllamaGenerateRequest": "prompt"}
"""Without this field such a request only loads the model, which the agent does by itself."""
_REFUSED = {
    "ChatRequest": ("functions", "function_call", "modalities", "audio", "web_search_options", "prediction"),
    "CompletionRequest": ("suffix", "best_of"),
    "ResponseRequest": ("store", "background", "previous_response_id", "conversation", "prompt", "truncation"),
    "OllamaGenerateRequest": ("template", "suffix", "images"),
    "OllamaOptions": ("typical_p", "tfs_z", "mirostat"),
    "OllamaOlderEmbeddingRequest": ("dimensions",),
}
"""What the models know only in order to refuse it by name."""
_SCALARS: dict[object, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
}

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}
MODEL: Schema = {"type": "string", "minLength": 1, "description": "Alias, package name, or <name>:<version>."}
KEEP_ALIVE: Schema = {
    "type": ["string", "number", "null"],
    "description": 'How long the model stays after its last use: seconds, "5m", -1 for ever, 0 not at all.',
}


def record(_required: str = "", /, **properties: Schema) -> Schema:
    """Return an object of ``properties``; those named in ``_required``, or all where it is empty, are always there."""
    return {"type": "object", "properties": properties, "required": _required.split() or list(properties)}


def optional(**properties: Schema) -> Schema:
    """Return an object of ``properties``, none of which must be there."""
    return {"type": "object", "properties": properties}


def listed(items: Schema, **bounds: int) -> Schema:
    """Return a list of ``items``."""
    return {"type": "array", "items": items, **bounds}


def either(*schemas: Schema) -> Schema:
    """Return what is one of ``schemas`` at least."""
    return {"anyOf": list(schemas)}


def ref(name: str) -> Schema:
    """Return a reference to a component."""
    return {"$ref": REFS + name}


def request_components() -> dict[str, Schema]:
    """Return the schemas of ``REQUESTS`` and of all that they use, and of ``Manifest``, by component name."""
    requests = [(model, "validation") for model in REQUESTS.values()]
    wanted: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((model, "validation") for model, _ in requests),
        (Manifest, "serialization"),
    ]
    places, definitions = models_json_schema(wanted, ref_template=REFS + "{model}")
    names = {places[model, "validation"]["$ref"].removeprefix(REFS): name for name, model in REQUESTS.items()}
    for key in definitions["$defs"]:
        plain = key.removeprefix("garrison_agent__runtimes__").replace("__", ".").lstrip("_")
        names.setdefault(key, key if plain in definitions["$defs"] else plain)
    components = {names[key]: _renamed(schema, names) for key, schema in definitions["$defs"].items()}
    for name in REQUESTS:
        _as_the_agent_takes_it(name, components[name])
    for name, refused in _REFUSED.items():
        for field in refused:
            del components[name]["properties"][field]
    return components


def _as_the_agent_takes_it(name: str, schema: Schema) -> None:
    """Add what the agent asks of a request before a worker sees it."""
    properties, required = schema["properties"], schema.setdefault("required", [])
    if "model" in properties:
        properties["model"] = MODEL
        required[:] = ["model", *(field for field in required if field not in ("model", _TO_LOAD.get(name)))]
    if name.startswith("Ollama"):
        properties["keep_alive"] = KEEP_ALIVE
    empty = _TO_LOAD.get(name)
    if empty:
        properties[empty].pop("minItems", None)
        properties[empty].pop("minLength", None)


def _renamed(schema: Any, names: dict[str, str]) -> Any:
    """Return ``schema`` with components renamed, and without the titles that pydantic makes up."""
    if isinstance(schema, list):
        return [_renamed(one, names) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result: Schema = {}
    for key, value in schema.items():
        if key == "$ref":
            result[key] = REFS + names[value.removeprefix(REFS)]
        elif key == "properties":
            result[key] = {name: _renamed(one, names) for name, one in value.items()}
        elif key != "title" or not isinstance(value, str):
            result[key] = _renamed(value, names)
    return result


def view_components(*views: object) -> dict[str, Schema]:
    """Return the schemas of typed dictionaries and of those inside them, by their own names."""
    return dict(one for view in views for one in _views(view))


def _views(hint: Any) -> Iterator[tuple[str, Schema]]:
    if is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)  # __required_keys__ does not see through strings
        yield (
            hint.__name__,
            {
                "type": "object",
                "properties": {name: _of_hint(one) for name, one in hints.items()},
                "required": [name for name, one in hints.items() if get_origin(one) is not NotRequired],
            },
        )
        for one in hints.values():
            yield from _views(one)
    else:
        for argument in get_args(hint):
            yield from _views(argument)


def _of_hint(hint: Any) -> Schema:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        return ref(hint.__name__)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return either(*map(_of_hint, arguments))
    if origin is NotRequired:
        return _of_hint(arguments[0])
    if origin is list:
        return listed(_of_hint(arguments[0]))
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_hint(arguments[1])}
    raise TypeError(f"no schema is known for {hint!r}")
