"""Every operation of the local API, as the OpenAPI document tells of it. docs/local-api.md is the page for people."""

from __future__ import annotations

from dataclasses import dataclass, field

from garrison_agent.api import cache_check, commands
from scripts.openapi_schemas import (
    ANY_OBJECT,
    COUNT,
    FLAG,
    MODEL,
    TEXT,
    Schema,
    either,
    listed,
    optional,
    record,
    ref,
)

JSON = "application/json"
EVENTS, LINES, PLAIN, BYTES = "text/event-stream", "application/x-ndjson", "text/plain", "application/octet-stream"
VIEWS = (
    commands.StatusView,
    commands.ModelView,
    commands.VariantsView,
    commands.RunningView,
    commands.LoadResult,
    commands.UnloadResult,
    commands.CacheView,
    commands.RemoveResult,
    commands.AppView,
    commands.AddedApp,
    commands.ExportPage,
    commands.Check,
    cache_check.CacheCheckView,
)


@dataclass(frozen=True)
class Operation:
    """One method of one path. ``answers``: content type -> schema; empty: no body. ``refused``: it always is."""

    method: str
    path: str
    summary: str
    answers: dict[str, Schema] = field(default_factory=dict)
    body: Schema | None = None
    query: dict[str, Schema] = field(default_factory=dict)
    headers: dict[str, Schema] = field(default_factory=dict)
    binary: bool = False
    """The body may also be, or is, bytes."""
    optional: bool = False
    """The body may be left out."""
    manages: bool = False
    """It needs the unix socket, or an admin key."""
    refused: bool = False


def _json(schema: Schema) -> dict[str, Schema]:
    return {JSON: schema}


def _const(value: object) -> Schema:
    return {"const": value}


_NUMBERS = listed({"type": "number"})
_USAGE = record(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
_OPENAI_MODEL = record(
    "id object created owned_by",
    id=TEXT,
    object=_const("model"),
    created={"type": "integer"},
    owned_by=TEXT,
    root=TEXT,
    loaded=FLAG,
)
_CHAT = record(
    id=TEXT,
    object=_const("chat.completion"),
    created=COUNT,
    model=TEXT,
    choices=listed(record("index message finish_reason", index=COUNT, message=ANY_OBJECT, finish_reason=TEXT)),
    usage=_USAGE,
)
_COMPLETION = record(
    id=TEXT,
    object=_const("text_completion"),
    created=COUNT,
    model=TEXT,
    choices=listed(record("index text finish_reason", index=COUNT, text=TEXT, finish_reason=TEXT)),
    usage=_USAGE,
)
_RESPONSE = record(
    id=TEXT,
    object=_const("response"),
    status={"enum": ["completed", "incomplete", "failed"]},
    model=TEXT,
    output=listed(ANY_OBJECT),
    usage=record(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
)
_EMBEDDINGS = record(
    object=_const("list"),
    data=listed(record(object=_const("embedding"), index=COUNT, embedding=either(_NUMBERS, TEXT))),
    model=TEXT,
    usage=record(prompt_tokens=COUNT, total_tokens=COUNT),
)

OPENAI = (
    Operation("GET", "/v1/models", "List the models", _json(record(object=_const("list"), data=listed(_OPENAI_MODEL)))),
    Operation("GET", "/v1/models/{name}", "Show a model, with Foundry Local's fields", _json(_OPENAI_MODEL)),
    Operation(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation",
        {JSON: _CHAT, EVENTS: TEXT},
        ref("ChatRequest"),
    ),
    Operation(
        "POST", "/v1/completions", "Continue a text", {JSON: _COMPLETION, EVENTS: TEXT}, ref("CompletionRequest")
    ),
    Operation("POST", "/v1/embeddings", "Turn texts into vectors", _json(_EMBEDDINGS), ref("EmbeddingRequest")),
    Operation("POST", "/v1/responses", "Answer an input", {JSON: _RESPONSE, EVENTS: TEXT}, ref("ResponseRequest")),
    *(
        Operation(method, f"/v1/responses/{{name}}{end}", "Refused: nothing is kept on a board", refused=True)
        for end in ("", "/input_items", "/cancel")
        for method in ("GET", "POST", "DELETE")
    ),
)

_DETAILS = record("format family", format=TEXT, family=TEXT)
_OLLAMA_MODEL = record("name model", name=TEXT, model=TEXT, size=COUNT, digest=TEXT, modified_at=TEXT, details=_DETAILS)
_ASKED_MODEL = record(model=MODEL)

OLLAMA = (
    Operation("GET", "/", "Say what answers here", {PLAIN: TEXT}),
    Operation("GET", "/api/version", "Which Ollama's API this is", _json(record(version=TEXT, garrison=TEXT))),
    Operation("GET", "/api/tags", "List the models", _json(record(models=listed(_OLLAMA_MODEL)))),
    Operation("GET", "/api/ps", "List the models in memory", _json(record(models=listed(_OLLAMA_MODEL)))),
    Operation(
        "POST",
        "/api/show",
        "Show a model",
        _json(record("details capabilities", details=_DETAILS, model_info=ANY_OBJECT, capabilities=listed(TEXT))),
        _ASKED_MODEL,
    ),
    Operation(
        "POST",
        "/api/chat",
        "Answer a conversation; without messages: load the model",
        {JSON: record(model=TEXT, message=ANY_OBJECT, done=FLAG), LINES: TEXT},
        ref("OllamaChatRequest"),
    ),
    Operation(
        "POST",
        "/api/generate",
        "Answer a prompt; without one: load the model",
        {JSON: record(model=TEXT, response=TEXT, done=FLAG), LINES: TEXT},
        ref("OllamaGenerateRequest"),
    ),
    Operation(
        "POST",
        "/api/embed",
        "Turn texts into vectors",
        _json(record(model=TEXT, embeddings=listed(_NUMBERS))),
        ref("OllamaEmbedRequest"),
    ),
    Operation(
        "POST",
        "/api/embeddings",
        "Turn a text into a vector",
        _json(record(embedding=_NUMBERS)),
        ref("OllamaOlderEmbeddingRequest"),
    ),
    Operation(
        "POST",
        "/api/pull",
        "Say that a model is here; none is fetched",
        {JSON: record(status=_const("success"), detail=TEXT), LINES: TEXT},
        record("model", model=MODEL, stream=FLAG),
    ),
    Operation("POST", "/api/push", "Refused: models come from the fleet", body=_ASKED_MODEL, refused=True),
    Operation("POST", "/api/create", "Refused: models come from the fleet", body=_ASKED_MODEL, refused=True),
    Operation(
        "POST",
        "/api/copy",
        "Refused: models come from the fleet",
        body=record(source=TEXT, destination=TEXT),
        refused=True,
    ),
    Operation("POST", "/api/blobs/{digest}", "Refused: models come from the fleet", binary=True, refused=True),
    Operation("DELETE", "/api/delete", "Refused: models come from the fleet", body=_ASKED_MODEL, refused=True),
)

_SIZES = listed({"type": "integer"})
_TENSOR = record(name=TEXT, datatype=TEXT, shape=_SIZES)
_MODEL_VIEW = record(
    "name versions inputs outputs",
    name=TEXT,
    versions=listed(TEXT),
    platform=TEXT,
    inputs=listed(_TENSOR),
    outputs=listed(_TENSOR),
)
_INFER = record(
    "inputs",
    id=TEXT,
    parameters=ANY_OBJECT,
    inputs=listed(
        record(
            "name datatype shape",
            name=TEXT,
            datatype=TEXT,
            shape=listed(COUNT),
            data=listed({}),
            parameters=ANY_OBJECT,
        )
    ),
    outputs=listed(record("name", name=TEXT, parameters=ANY_OBJECT)),
)
_INFERRED = record("model_name model_version outputs", model_name=TEXT, model_version=TEXT, outputs=listed(_TENSOR))


def _of_tensor_model(base: str) -> tuple[Operation, ...]:
    ready = _json(record(name=TEXT, ready=FLAG))
    length = {"Inference-Header-Content-Length": COUNT}
    return (
        Operation("GET", base, "Show what a model takes and gives", _json(_MODEL_VIEW)),
        Operation("GET", f"{base}/ready", "Whether a model answers without being loaded", ready),
        Operation(
            "POST",
            f"{base}/infer",
            "Run a model on tensors: JSON, with binary data behind it if wanted",
            {JSON: _INFERRED, BYTES: {}},
            _INFER,
            headers=length,
            binary=True,
        ),
    )


OPEN_INFERENCE = (
    Operation("GET", "/v2", "What this server is", _json(record(name=TEXT, version=TEXT, extensions=listed(TEXT)))),
    Operation("GET", "/v2/health/live", "Whether the API runs", _json(record(live=FLAG))),
    Operation("GET", "/v2/health/ready", "Whether requests are taken", _json(record(ready=FLAG))),
    *_of_tensor_model("/v2/models/{name}"),
    *_of_tensor_model("/v2/models/{name}/versions/{version}"),
)

_OUTCOME = _json(record(status=TEXT))
_DOWNLOAD = _json(record(Success=FLAG, ErrorMessage={"type": ["string", "null"]}))
_IDS = _json(listed(TEXT))

FOUNDRY = (
    Operation(
        "GET",
        "/status",
        "Where models are, where the API listens",
        _json(record(modelCachePath=TEXT, endpoints=listed(TEXT), pid=COUNT)),
    ),
    Operation("GET", "/models/loaded", "The ids of loaded models", _IDS),
    *(
        Operation(method, f"/models/{verb}/{{name}}", f"{verb.capitalize()} a model", _OUTCOME, manages=True)
        for verb in ("load", "unload")
        for method in ("GET", "POST")
    ),
    Operation("GET", "/foundry/list", "The catalog: what the fleet gave the board", _json(listed(ANY_OBJECT))),
    Operation("GET", "/openai/status", "Where the API listens", _json(record(Endpoints=listed(TEXT)))),
    Operation("GET", "/openai/models", "The ids of models", _IDS),
    Operation("GET", "/openai/loadedmodels", "The ids of loaded models", _IDS),
    Operation(
        "GET",
        "/openai/load/{name}",
        "Load a model",
        query={"ttl": COUNT, "unload": FLAG, "ep": TEXT},
        manages=True,
    ),
    Operation("GET", "/openai/unload/{name}", "Unload a model", query={"force": FLAG}, manages=True),
    Operation("GET", "/openai/unloadall", "Unload all models", manages=True),
    Operation("GET", "/openai/getgpudevice", "The GPU in use; -1: none", _json({"type": "integer"})),
    Operation("GET", "/openai/setgpudevice/{device}", "Refused: models run on the CPU", manages=True, refused=True),
    *(
        Operation("POST", f"/openai/{verb}", "Say that models come from the fleet", _DOWNLOAD, ANY_OBJECT)
        for verb in ("download", "register")
    ),
    Operation(
        "POST",
        "/v1/chat/completions/tokenizer/encode/count",
        "Count the tokens of a chat request",
        _json(record(tokenCount=COUNT)),
        ref("ChatRequest"),
    ),
)

_MODEL = "/garrison/v1/models/{name}"

BOARD = (
    Operation("GET", "/garrison/v1/status", "Everything that status shows", _json(ref("StatusView"))),
    Operation("GET", "/garrison/v1/models", "The packages on the board", _json(listed(ref("ModelView")))),
    Operation("GET", _MODEL, "One package", _json(ref("ModelView"))),
    Operation("GET", f"{_MODEL}/variants", "Its builds, and why each fits or not", _json(ref("VariantsView"))),
    Operation("GET", f"{_MODEL}/manifest", "Its manifest, as it was signed", _json(ref("Manifest"))),
    Operation(
        "POST",
        f"{_MODEL}/load",
        "Load a model",
        _json(ref("LoadResult")),
        optional(keep_alive_s={"type": ["number", "null"]}),
        optional=True,
        manages=True,
    ),
    Operation("POST", f"{_MODEL}/unload", "Unload a model", _json(ref("UnloadResult")), manages=True),
    Operation("GET", "/garrison/v1/loaded", "What is in memory", _json(listed(ref("RunningView")))),
    Operation("GET", "/garrison/v1/cache", "What is on the disk", _json(ref("CacheView"))),
    Operation("DELETE", "/garrison/v1/cache/{name}", "Remove a package", _json(ref("RemoveResult")), manages=True),
    Operation(
        "POST",
        "/garrison/v1/cache-check",
        "Begin to read installed files back",
        _json(ref("CacheCheckView")),
        optional(name={"type": ["string", "null"]}, repair=FLAG),
        optional=True,
        manages=True,
    ),
    Operation("GET", "/garrison/v1/cache-check/{id}", "How far a check is", _json(ref("CacheCheckView"))),
    Operation("DELETE", "/garrison/v1/cache-check/{id}", "End a check", _json(ref("CacheCheckView")), manages=True),
    Operation("GET", "/garrison/v1/doctor", "What is wrong, and what to do", _json(listed(ref("Check")))),
    Operation("GET", "/garrison/v1/apps", "The applications", _json(listed(ref("AppView"))), manages=True),
    Operation(
        "POST",
        "/garrison/v1/apps",
        "Add an application; its key is shown once",
        _json(ref("AddedApp")),
        ref("NewApplication"),
        manages=True,
    ),
    Operation("GET", "/garrison/v1/apps/{name}", "One application", _json(ref("AppView")), manages=True),
    Operation("DELETE", "/garrison/v1/apps/{name}", "Remove an application", _json(ref("AppView")), manages=True),
    Operation("POST", "/garrison/v1/bundle", "Begin to import a stick", _json(record(session=TEXT)), manages=True),
    Operation(
        "POST",
        "/garrison/v1/bundle/{session}",
        "Answer the import's question, and get the next",
        _json(ANY_OBJECT),
        headers={"x-number": COUNT, "x-failed": TEXT},
        binary=True,
        optional=True,
        manages=True,
    ),
    Operation(
        "POST", "/garrison/v1/export/{cursor}", "What goes home on a stick", _json(ref("ExportPage")), manages=True
    ),
    Operation("GET", "/metrics", "Measurements for Prometheus", {PLAIN: TEXT}),
    Operation("GET", "/openapi.json", "This document", _json(ANY_OBJECT)),
)

SURFACES = {
    "OpenAI": OPENAI,
    "Ollama": OLLAMA,
    "Open Inference Protocol": OPEN_INFERENCE,
    "Foundry Local": FOUNDRY,
    "Board": BOARD,
}
