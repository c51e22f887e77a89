"""The Open Inference Protocol's REST surface, ``/v2``: tensors passed to the model's worker."""

from __future__ import annotations

from importlib.metadata import version as package_version
from urllib.parse import quote

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.asgi import Request, RouteBook
from garrison_agent.api.errors import BadRequestError, lease_expired, oip_body
from garrison_agent.api.routes import Route
from garrison_protocol.errors import NotFoundError, UnavailableError
from garrison_protocol.states import Engine


class InferenceProtocol:
    """Handlers of ``/v2``."""

    def __init__(self, access: ModelAccess) -> None:
        self._access = access

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/v2", self.server)
        book.add("GET", "/v2/health/live", self.live)
        book.add("GET", "/v2/health/ready", self.ready)
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            book.add("GET", model, self.model)
            book.add("GET", f"{model}/ready", self.model_ready)
            book.add("POST", f"{model}/infer", self.infer)

    async def server(self, request: Request) -> None:
        """Answer with what this server is."""
        server = {"name": "garrison-agent", "version": package_version("garrison")}
        await request.answer({**server, "extensions": ["binary_tensor_data"]})

    async def live(self, request: Request) -> None:
        """Answer that the API runs."""
        await request.answer({"live": True})

    async def ready(self, request: Request) -> None:
        """Answer that requests are taken: models that are not loaded are loaded on demand."""
        await request.answer({"ready": True})

    async def model_ready(self, request: Request) -> None:
        """Answer whether the model would answer without being loaded first."""
        route = self._find(request)
        if route.barred:
            raise lease_expired(route.model_id)
        if route.socket is None:
            raise UnavailableError(
                "model.not_loaded", f"{route.alias} is not loaded", hint="the first request loads it", retryable=True
            )
        await request.answer({"name": request.params["name"], "ready": True})

    async def model(self, request: Request) -> None:
        """Pass the worker's description of its inputs and outputs."""
        await self._forward(request, "", b"")

    async def infer(self, request: Request) -> None:
        """Pass the request's bytes to the worker."""
        await self._forward(request, "/infer", await request.body())

    def _find(self, request: Request) -> Route:
        route = self._access.find(request.params["name"])
        asked = request.params.get("version")
        if asked is not None and asked != route.package.version:
            raise NotFoundError(
                "model.version_unknown",
                f"{route.alias} is served in version {route.package.version}, not {asked}",
                hint="leave the version out to get the one in service",
            )
        return route

    async def _forward(self, request: Request, suffix: str, body: bytes) -> None:
        route = self._find(request)
        if route.engine is not Engine.ONNXRUNTIME:
            raise BadRequestError(
                "api.wrong_protocol",
                f"{route.alias} takes text, not tensors",
                hint="POST /v1/chat/completions (OpenAI)",
            )

        def target(route: Route) -> str:
            return f"/v2/models/{quote(route.package.name)}{suffix}"

        await self._access.pass_on(request, request.params["name"], target, body, oip_body)
