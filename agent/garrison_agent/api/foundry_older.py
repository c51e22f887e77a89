"""The older generation of Foundry Local's service, ``/foundry`` and ``/openai``: its clients manage models with GETs.

Names and ids are ``<name>:<version>``, as its SDKs take them. Where its reference and its SDKs disagree on the case of
a field (``ModelDirPath``, ``modelDirPath``), both are given. Source: Foundry Local REST reference; foundry_local 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from garrison_agent.api.access import LOAD_TIMEOUT_S, ModelAccess
from garrison_agent.api.asgi import Request, RouteBook, parse_object
from garrison_agent.api.commands import ListCache, LoadModel, UnloadModel
from garrison_agent.api.errors import BadRequestError, openai_body
from garrison_agent.api.openai import unix_seconds
from garrison_agent.api.routes import Route
from garrison_protocol.states import DeviceType, Engine

COUNT_PATH = "/v1/chat/completions/tokenizer/encode/count"
_MODEL_TYPES = {Engine.LLAMA_CPP: "GGUF", Engine.ONNXRUNTIME: "ONNX"}
_MIB = 1024 * 1024
_NO_DEVICE = -1


class FoundryOlder:
    """Handlers of ``/foundry`` and ``/openai``. ``endpoints`` are the URLs that the API listens on."""

    def __init__(
        self, access: ModelAccess, endpoints: Callable[[], list[str]], check_manager: Callable[[Request], None]
    ) -> None:
        self._access = access
        self._endpoints = endpoints
        self._check_manager = check_manager

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/foundry/list", self.list_models)
        book.add("GET", "/openai/status", self.status)
        book.add("GET", "/openai/models", self.cached)
        book.add("GET", "/openai/loadedmodels", self.loaded)
        book.add("GET", "/openai/load/{name}", self.load)
        book.add("GET", "/openai/unload/{name}", self.unload)
        book.add("GET", "/openai/unloadall", self.unload_all)
        book.add("GET", "/openai/getgpudevice", self.gpu_device)
        book.add("GET", "/openai/setgpudevice/{device}", self.set_gpu_device)
        book.add("POST", "/openai/download", self.download)
        book.add("POST", "/openai/register", self.download)
        book.add("POST", COUNT_PATH, self.count_tokens)

    async def list_models(self, request: Request) -> None:
        """Answer with every model in service: a board's catalog is what its fleet gave it."""
        await request.answer([catalog_entry(route) for route in self._access.table.routes])

    async def status(self, request: Request) -> None:
        """Answer with where the API listens, and where models are kept. There is no named pipe."""
        cache: Any = await self._access.ask(ListCache())
        endpoints, location = self._endpoints(), cache["location"]
        await request.answer(
            {
                "Endpoints": endpoints,
                "ModelDirPath": location,
                "PipeName": "",
                "endpoints": endpoints,
                "modelDirPath": location,
                "pipeName": "",
            }
        )

    async def cached(self, request: Request) -> None:
        """Answer with the ids of the models that can be loaded."""
        await request.answer(sorted({route.model_id for route in self._access.table.routes}))

    async def loaded(self, request: Request) -> None:
        """Answer with the ids of loaded models."""
        await request.answer(sorted({route.model_id for route in self._access.table.routes if route.loaded}))

    async def load(self, request: Request) -> None:
        """Load a model; answers with an empty body once it serves. ``ttl`` and ``unload`` say how long it stays."""
        self._check_manager(request)
        route = self._access.find(request.params["name"])
        provider = _provider(route)
        wanted = request.query("ep")
        if wanted is not None and wanted.lower() not in (provider.lower(), _short(provider)):
            raise BadRequestError(
                "api.provider_unavailable",
                f"{route.model_id} runs here on {provider}, not on {wanted!r}",
                hint="leave ep out: which build runs on this board was chosen when it was installed",
            )
        await self._access.ask(LoadModel(request.params["name"], _keep_alive_s(request)), LOAD_TIMEOUT_S)
        await _answer_empty(request)

    async def unload(self, request: Request) -> None:
        """End a model's worker; answers with an empty body. It ends in any case, whatever ``force`` says."""
        self._check_manager(request)
        await self._access.ask(UnloadModel(request.params["name"]), LOAD_TIMEOUT_S)
        await _answer_empty(request)

    async def unload_all(self, request: Request) -> None:
        """End the workers of all models; answers with an empty body."""
        self._check_manager(request)
        for route in self._access.table.routes:
            if route.loaded:
                await self._access.ask(UnloadModel(route.alias), LOAD_TIMEOUT_S)
        await _answer_empty(request)

    async def gpu_device(self, request: Request) -> None:
        """Answer with the number of the GPU in use: -1, there is none."""
        await request.answer(_NO_DEVICE)

    async def set_gpu_device(self, request: Request) -> None:
        """Refuse: models run on what they were installed for."""
        self._check_manager(request)
        raise BadRequestError(
            "api.device_unavailable", "models run on the CPU here", hint="install a build for another device"
        )

    async def download(self, request: Request) -> None:
        """Refuse, since models come from the fleet; but a model that is here already counts as downloaded.

        The status is 200 all the same: this surface reports failures in the body, and its clients look only there.
        """
        asked = parse_object(await request.body())
        model = asked.get("model")
        name = (model.get("Name") or model.get("name")) if isinstance(model, dict) else asked.get("ModelName")
        here = isinstance(name, str) and self._access.table.find(name) is not None
        message = None
        if not here or request.path.endswith("/register"):
            message = (
                "models come from the fleet, signed, and are not fetched by applications; "
                "ask its operators to roll the model out to this board"
            )
        success = message is None
        await request.answer({"Success": success, "ErrorMessage": message, "success": success, "errorMessage": message})

    async def count_tokens(self, request: Request) -> None:
        """Pass the request's bytes to the worker, which counts the tokens of its prompt."""
        body = await request.body()
        name = parse_object(body).get("model")
        if not isinstance(name, str) or not name:
            raise BadRequestError(
                "api.model_missing",
                "the body has no text field 'model'",
                hint="set it to one of the names that GET /v1/models lists",
                param="model",
            )
        route = self._access.find(name)
        if route.engine is Engine.ONNXRUNTIME:
            raise BadRequestError("api.wrong_protocol", f"{name} takes tensors, not text", param="model")
        await self._access.pass_on(request, name, COUNT_PATH, body, openai_body)


def catalog_entry(route: Route) -> dict[str, object]:
    """Return a model as Foundry Local's catalog lists it."""
    manifest, variant = route.manifest, route.variant
    device = variant.runtime.device_type
    return {
        "id": route.model_id,
        "name": route.model_id,
        "displayName": manifest.display_name,
        "modelType": _MODEL_TYPES.get(route.engine, route.engine.value),
        "providerType": "Garrison",
        "uri": f"garrison://models/{manifest.name}/versions/{manifest.version}",
        "version": manifest.version,
        "promptTemplate": {},
        "publisher": manifest.publisher,
        "task": manifest.task,
        "runtime": {"deviceType": DeviceType(device).value, "executionProvider": _provider(route)},
        "fileSizeMb": -(-variant.size_bytes // _MIB),
        "modelSettings": {
            "parameters": [{"name": key, "value": str(value)} for key, value in sorted(variant.model_settings.items())]
        },
        "alias": route.alias,
        "supportsToolCalling": manifest.supports_tool_calling,
        "license": manifest.license,
        "licenseDescription": manifest.license_description,
        "parentModelUri": manifest.provenance.base_model,
        "maxOutputTokens": manifest.max_output_tokens,
        "minFLVersion": "",
        "cached": True,
        "createdAt": unix_seconds(manifest.created_at),
        "contextLength": manifest.context_length,
        "inputModalities": ",".join(manifest.input_modalities),
        "outputModalities": ",".join(manifest.output_modalities),
        "capabilities": ",".join(manifest.capabilities),
    }


def _keep_alive_s(request: Request) -> float | None:
    """Return how long a model stays after its last use: ``ttl`` seconds, or for ever with ``unload=false``."""
    ttl = request.query("ttl")
    if ttl is not None:
        if not ttl.isdecimal() or len(ttl) > 9:
            raise BadRequestError("api.keep_alive_malformed", "ttl is no number of seconds", hint="such as ttl=600")
        if int(ttl) > 0:
            return float(ttl)
    return -1.0 if (request.query("unload") or "").lower() == "false" else None


def _provider(route: Route) -> str:
    """Return the execution provider that the variant was made for; others may follow as a resort."""
    return route.variant.runtime.execution_provider.partition(",")[0].strip()


def _short(provider: str) -> str:
    """Return the name of an execution provider as ``ep`` has it: ``cpu`` for ``CPUExecutionProvider``."""
    return provider.removesuffix("ExecutionProvider").lower()


async def _answer_empty(request: Request) -> None:
    await request.start(200, [(b"content-length", b"0")])
    await request.end()
