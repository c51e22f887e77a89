"""Ollama's surface, ``/api``, so that its clients work unchanged. Models come from the fleet: pulling one does not.

Listing and showing answer from the route table; ``chat``, ``generate``, ``embed``, and ``embeddings`` are passed to the
model's worker, which speaks them itself. Source: Ollama, docs/api.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from typing import Any

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.asgi import Request, RouteBook, parse_object
from garrison_agent.api.commands import ListLoaded, LoadedView, SetKeepAlive
from garrison_agent.api.errors import BadRequestError, ollama_body
from garrison_agent.api.routes import Route
from garrison_agent.core.residency import keep_alive
from garrison_protocol.errors import DeniedError, NotFoundError
from garrison_protocol.states import Engine

API_LEVEL = "0.12.11"
"""The version of Ollama whose API this is: clients ask for it, and turn off what an older one does not have."""
MAX_KEEP_ALIVE_S = 86400.0
"""The longest for who may not manage the board: a model that never left would stand in the way of a deployment."""
_LATEST = ":latest"
_NEVER = "9999-12-31T23:59:59Z"
"""When a model leaves memory that stays: Ollama's clients show a time so far away as "Forever"."""
_DURATION = re.compile(r"([+-]?)((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Ollama:
    """Handlers of ``/`` and ``/api``."""

    def __init__(self, access: ModelAccess, check_manager: Callable[[Request], None]) -> None:
        self._access = access
        self._check_manager = check_manager

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/", self.root)
        book.add("GET", "/api/version", self.version)
        book.add("GET", "/api/tags", self.tags)
        book.add("GET", "/api/ps", self.ps)
        book.add("POST", "/api/show", self.show)
        for path in ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings"):
            book.add("POST", path, self.generate)
        book.add("POST", "/api/pull", self.pull)
        for path in ("/api/push", "/api/create", "/api/copy", "/api/blobs/{digest}"):
            book.add("POST", path, self.refuse)
        book.add("DELETE", "/api/delete", self.refuse)

    async def root(self, request: Request) -> None:
        """Say what answers here, in words: clients probe this path to see whether anything does."""
        text = b"garrison-agent is running. It speaks Ollama, OpenAI, Foundry Local, and the Open Inference Protocol."
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
        await request.start(200, headers)
        await request.end(text)

    async def version(self, request: Request) -> None:
        """Answer with the version of Ollama whose API this is, and with the agent's own."""
        await request.answer({"version": API_LEVEL, "garrison": package_version("garrison")})

    async def tags(self, request: Request) -> None:
        """Answer with every text model in service, loaded or not."""
        models = [_model(route) for route in self._access.table.routes if _takes_text(route)]
        await request.answer({"models": models})

    async def ps(self, request: Request) -> None:
        """Answer with the models in memory, and when they leave it."""
        loaded: Any = await self._access.ask(ListLoaded())
        views: dict[str, LoadedView] = {view["alias"]: view for view in loaded}
        models = []
        for route in self._access.table.routes:
            view = views.get(route.alias)
            if view is None or not _takes_text(route):
                continue
            expires_at = _NEVER if view["expires_at"] is None else _timestamp(view["expires_at"])
            memory = {"size": view["size_bytes"], "size_vram": 0, "expires_at": expires_at}
            models.append({**_model(route), **memory})
        await request.answer({"models": models})

    async def show(self, request: Request) -> None:
        """Answer with what is known of one model: its manifest says it."""
        route = self._find(_name(parse_object(await request.body())))
        manifest, variant = route.manifest, route.variant
        license_text = "\n\n".join(text for text in (manifest.license, manifest.license_description) if text)
        parameters = "\n".join(f"{key:<30} {value}" for key, value in sorted(variant.model_settings.items()))
        architecture = str(variant.model_settings.get("architecture", "unknown"))
        await request.answer(
            {
                "license": license_text,
                "modelfile": f"# This model comes from the fleet; it cannot be changed here.\nFROM {route.model_id}\n",
                "parameters": parameters,
                "template": "",
                "details": _details(route),
                "model_info": {
                    "general.architecture": architecture,
                    "general.name": manifest.display_name,
                    "general.basename": manifest.name,
                    "general.version": manifest.version,
                    "general.organization": manifest.publisher,
                    "general.license": manifest.license,
                    "general.parameter_count": manifest.parameter_count,
                    f"{architecture}.context_length": manifest.context_length,
                },
                "capabilities": _capabilities(route),
                "modified_at": _modified_at(route),
            }
        )

    async def generate(self, request: Request) -> None:
        """Pass the request's bytes to the model's worker. Without a prompt the model is only loaded or unloaded."""
        body = await request.body()
        asked = parse_object(body)
        route = self._find(_name(asked))
        keep_alive_s = self._keep_alive_s(request, asked)
        self._access.admit(request)  # who has used up his share has no say in what is in memory either
        chat = request.path == "/api/chat"
        if not asked.get("messages") if chat else request.path == "/api/generate" and not asked.get("prompt"):
            await self._load(request, route, _name(asked), keep_alive_s, chat=chat)
            return
        if keep_alive_s:
            self._access.tell(SetKeepAlive(route.alias, keep_alive_s))
        try:
            await self._access.pass_on(request, route.alias, request.path, body, ollama_body)
        finally:
            if keep_alive_s == 0:  # not earlier: it could leave memory before it has answered
                self._access.tell(SetKeepAlive(route.alias, 0.0))

    def _keep_alive_s(self, request: Request, asked: dict[str, object]) -> float | None:
        """Return how long the model stays after this request, as far as its sender has a say in that."""
        seconds = parse_keep_alive(asked.get("keep_alive"))
        if seconds is None or 0 <= seconds <= MAX_KEEP_ALIVE_S:
            return seconds
        try:
            self._check_manager(request)
        except DeniedError:
            return MAX_KEEP_ALIVE_S
        return seconds

    async def _load(self, request: Request, route: Route, name: str, keep_alive_s: float | None, *, chat: bool) -> None:
        """Load a model, or let it leave memory when ``keep_alive_s`` is 0."""
        unload = keep_alive_s == 0
        if not unload:
            await self._access.load(request, route, keep_alive_s)
        elif route.socket is not None:
            await self._access.ask(SetKeepAlive(route.alias, 0.0))
        answer: dict[str, object] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
        created_at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        reason = "unload" if unload else "load"
        await request.answer({"model": name, "created_at": created_at, **answer, "done": True, "done_reason": reason})

    async def pull(self, request: Request) -> None:
        """Answer that a model is here, if it is; it cannot be fetched by an application."""
        asked = parse_object(await request.body())
        name = _name(asked)
        try:
            route = self._find(name)
        except NotFoundError as error:
            raise _from_fleet(f"{name} cannot be pulled") from error
        note = f"{route.model_id} is here already; which version serves is the fleet's decision"
        if asked.get("stream") is False:
            await request.answer({"status": "success", "detail": note})
            return
        lines = b"".join(json.dumps({"status": status}).encode() + b"\n" for status in (note, "success"))
        await request.start(200, [(b"content-type", b"application/x-ndjson")])
        await request.end(lines)

    async def refuse(self, request: Request) -> None:
        """Refuse what would change which models are here."""
        verb = request.path.split("/")[2]
        raise _from_fleet(f"/api/{verb} is not possible here")

    def _find(self, name: str) -> Route:
        """Return the route of ``NAME``, ``NAME:latest``, or ``<name>:<version>``."""
        table = self._access.table
        plain = name.removesuffix(_LATEST)
        route = self._access.find(name if table.find(name) is not None else plain)
        if not _takes_text(route):
            raise BadRequestError(
                "api.wrong_protocol",
                f"{name} takes tensors, not text",
                hint=f"POST /v2/models/{route.alias}/infer (Open Inference Protocol)",
            )
        return route


def parse_keep_alive(value: object) -> float | None:
    """Return ``keep_alive`` in seconds; None if there is none, -1 for ever. ``5``, ``"5"``, and ``"1h30m"`` will do.

    Raises:
        BadRequestError: ``api.keep_alive_malformed``.
    """
    if value is None:
        return None
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = keep_alive(value)
    elif isinstance(value, str) and len(value) <= 64:
        match = _DURATION.fullmatch(value)
        if match is not None:
            seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION_PART.findall(value))
            seconds = -seconds if match[1] == "-" else seconds
        elif re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?", value):
            seconds = float(value)
    if math.isnan(seconds):
        raise BadRequestError(
            "api.keep_alive_malformed", "keep_alive is no duration", hint='write seconds, "5m", -1 (stay), or 0 (leave)'
        )
    return keep_alive(seconds)


def _name(asked: dict[str, object]) -> str:
    """Return the model's name; older clients call it ``name``."""
    name = asked.get("model") or asked.get("name")
    if not isinstance(name, str) or not name:
        raise BadRequestError("api.model_missing", "model is required", hint="GET /api/tags lists the models here")
    return name


def _from_fleet(what: str) -> DeniedError:
    return DeniedError(
        "model.from_fleet",
        f"{what}: models come from the fleet, signed",
        hint="ask the fleet's operators to roll the model out to this board; GET /api/tags lists what is here",
    )


def _takes_text(route: Route) -> bool:
    return route.engine is not Engine.ONNXRUNTIME


def _model(route: Route) -> dict[str, object]:
    name = f"{route.alias}{_LATEST}"
    return {
        "name": name,
        "model": name,
        "modified_at": _modified_at(route),
        "size": route.variant.size_bytes,
        "digest": route.package.manifest_sha256,
        "details": _details(route),
    }


def _details(route: Route) -> dict[str, object]:
    architecture = str(route.variant.model_settings.get("architecture", ""))
    return {
        "parent_model": route.manifest.provenance.base_model,
        "format": "gguf" if route.engine is Engine.LLAMA_CPP else route.engine.value,
        "family": architecture,
        "families": [architecture] if architecture else None,
        "parameter_size": parameter_size(route.manifest.parameter_count),
        "quantization_level": route.variant.quantization,
    }


def _capabilities(route: Route) -> list[str]:
    if route.manifest.makes_embeddings(route.variant):
        return ["embedding"]
    return ["completion", "tools"] if route.manifest.supports_tool_calling else ["completion"]


def parameter_size(count: int) -> str:
    """Return a number of parameters as Ollama writes it: ``8.0B``, ``134.52M``; empty if it is not known."""
    if count >= 10**9:
        return f"{count / 1e9:.1f}B"
    if count >= 10**6:
        return f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.2f}K" if count >= 1000 else str(count or "")


def _modified_at(route: Route) -> str:
    """Return the manifest's time; 1970 if the publisher wrote something else, since clients insist on a time."""
    try:
        return datetime.fromisoformat(route.manifest.created_at).astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        return _timestamp(0)


def _timestamp(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat().replace("+00:00", "Z")
