"""The OpenAI surface, ``/v1``: the model list, and text requests passed to the model's worker."""

from __future__ import annotations

from datetime import datetime

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.asgi import Request, RouteBook, parse_object
from garrison_agent.api.errors import BadRequestError, openai_body
from garrison_agent.api.relay import forward
from garrison_agent.api.routes import Route
from garrison_protocol.states import Engine

_TEXT_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class OpenAI:
    """Handlers of ``/v1``."""

    def __init__(self, access: ModelAccess) -> None:
        self._access = access

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/v1/models", self.list_models)
        book.add("GET", "/v1/models/{name}", self.show_model)
        for path in _TEXT_PATHS:
            book.add("POST", path, self.generate)

    async def list_models(self, request: Request) -> None:
        """Answer with every alias that is in service, loaded or not."""
        await request.answer({"object": "list", "data": [_model(route) for route in self._access.table.routes]})

    async def show_model(self, request: Request) -> None:
        """Answer with one model, under the name it was asked for by."""
        name = request.params["name"]
        await request.answer({**_model(self._access.find(name)), "id": name})

    async def generate(self, request: Request) -> None:
        """Pass the request's bytes to the worker of the model that its ``model`` field names."""
        body = await request.body()
        name = _model_name(body)
        _require_text(self._access.find(name), name)
        _, upstream = await self._access.open(request, name)
        await forward(request, upstream, request.path, body, openai_body)


def _model_name(body: bytes) -> str:
    name = parse_object(body).get("model")
    if not isinstance(name, str) or not name:
        raise BadRequestError(
            "api.model_missing",
            "the body has no text field 'model'",
            hint="set it to one of the names that GET /v1/models lists",
            param="model",
        )
    return name


def _require_text(route: Route, name: str) -> None:
    if route.engine is not Engine.LLAMA_CPP:
        raise BadRequestError(
            "api.wrong_protocol",
            f"{name} takes tensors, not text",
            hint=f"POST /v2/models/{route.alias}/infer (Open Inference Protocol)",
            param="model",
        )


def _model(route: Route) -> dict[str, object]:
    return {
        "id": route.alias,
        "object": "model",
        "created": _unix_seconds(route.manifest.created_at),
        "owned_by": route.manifest.publisher,
        "root": route.model_id,
        "loaded": route.loaded,
    }


def _unix_seconds(text: str) -> int:
    """Return an ISO 8601 time of a manifest as OpenAI's integer; 0 if the publisher wrote something else."""
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        return 0
