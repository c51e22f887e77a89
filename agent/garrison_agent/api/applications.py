"""Applications that share the local API, ``/garrison/v1/apps``: for managers of the board, and admin keys."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.asgi import Request, RouteBook
from garrison_agent.api.commands import AddApp, ListApps, RemoveApp, ShowApp
from garrison_agent.api.errors import BadRequestError
from garrison_agent.core.applications import MAX_PER_MINUTE


class _NewApp(BaseModel):
    """The body of ``POST /garrison/v1/apps``; a misspelt limit is no silent default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=200)
    models: list[str] = Field(default=[], max_length=256)
    requests_per_min: int = Field(default=0, ge=0, le=MAX_PER_MINUTE)
    tokens_per_min: int = Field(default=0, ge=0, le=MAX_PER_MINUTE)
    concurrent: int = Field(default=0, ge=0, le=MAX_PER_MINUTE)
    admin: bool = False


class ApplicationsApi:
    """Handlers of ``/garrison/v1/apps``. Only the answer to the one that adds an application holds its key."""

    def __init__(self, access: ModelAccess, check_manager: Callable[[Request], None]) -> None:
        self._access = access
        self._check_manager = check_manager

    def add_to(self, book: RouteBook) -> None:
        """Register every path."""
        book.add("GET", "/garrison/v1/apps", self.list)
        book.add("POST", "/garrison/v1/apps", self.add)
        book.add("GET", "/garrison/v1/apps/{name}", self.show)
        book.add("DELETE", "/garrison/v1/apps/{name}", self.remove)

    async def list(self, request: Request) -> None:
        """Answer with a list of ``AppView``."""
        self._check_manager(request)
        await request.answer(await self._access.ask(ListApps()))

    async def add(self, request: Request) -> None:
        """Make an application; answers with an ``AddedApp``."""
        self._check_manager(request)
        wanted = parse_new_app(await request.body())
        command = AddApp(**{**wanted.model_dump(), "models": tuple(wanted.models)})
        await request.answer(await self._access.ask(command), headers=[(b"cache-control", b"no-store")])

    async def show(self, request: Request) -> None:
        """Answer with an ``AppView``."""
        self._check_manager(request)
        await request.answer(await self._access.ask(ShowApp(request.params["name"])))

    async def remove(self, request: Request) -> None:
        """Forget an application; answers with its ``AppView``."""
        self._check_manager(request)
        await request.answer(await self._access.ask(RemoveApp(request.params["name"])))


def parse_new_app(body: bytes) -> _NewApp:
    """Return what application the body describes.

    Raises:
        BadRequestError: ``app.malformed``.
    """
    try:
        return _NewApp.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequestError(
            "app.malformed", f"{where or 'the body'}: {first['msg']}", hint="see garrison-agent app add --help"
        ) from error
