"""The OpenAI surface, ``/v1``: the model list, and text requests passed to the model's worker."""

from __future__ import annotations

from datetime import datetime

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.asgi import Request, RouteBook, parse_object
from garrison_agent.api.errors import BadRequestError, openai_body
from garrison_agent.api.routes import Route
from garrison_protocol.errors import NotFoundError
from garrison_protocol.states import Engine

_TEXT_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")


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
        for path in ("/v1/responses/{name}", "/v1/responses/{name}/input_items", "/v1/responses/{name}/cancel"):
            book.add("GET POST DELETE", path, _no_such_response)

    async def list_models(self, request: Request) -> None:
        """Answer with every alias that is in service, loaded or not."""
        models = [_model(route) for route in self._access.table.routes]
        models += [server.listed() for server in self._access.upstreams]
        await request.answer({"object": "list", "data": models})

    async def show_model(self, request: Request) -> None:
        """Answer with one model, under the name it was asked for by, with Foundry Local's fields, too."""
        from garrison_agent.api.foundry_older import catalog_entry

        name = request.params["name"]
        server = self._access.find_upstream(name)
        if server is not None:
            await request.answer(server.listed())
            return
        route = self._access.find(name)
        await request.answer({**catalog_entry(route), **_model(route), "id": name})

    async def generate(self, request: Request) -> None:
        """Pass the request's bytes to the worker of the model that its ``model`` field names."""
        body = await request.body()
        name = _model_name(body)
        server = self._access.find_upstream(name)
        if server is not None:
            await self._access.forward_upstream(request, server, body)
            return
        _require_text(self._access.find(name), name)
        await self._access.pass_on(request, name, request.path, body, openai_body)


async def _no_such_response(request: Request) -> None:
    raise NotFoundError(
        "api.response_unknown",
        f"there is no response {request.params['name'][:64]!r}: nothing is kept on a board",
        hint="send the whole conversation as the input of POST /v1/responses",
        param="response_id",
    )


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
        "created": unix_seconds(route.manifest.created_at),
        "owned_by": route.manifest.publisher,
        "root": route.model_id,
        "loaded": route.loaded,
    }


def unix_seconds(text: str) -> int:
    """Return an ISO 8601 time of a manifest as OpenAI's integer; 0 if the publisher wrote something else."""
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        return 0
