"""The applications that share the local API: added, removed, and charged here; read as an immutable table elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from garrison_agent.adapters.database import Database
from garrison_agent.api.commands import AddApp, AddedApp, AppView
from garrison_agent.core.applications import (
    KEY_BYTES,
    KEY_PREFIX,
    MAX_APPLICATIONS,
    Application,
    ApplicationTable,
    check_limits,
    check_name,
    key_digest,
)
from garrison_agent.outbox.journal import Journal
from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol.errors import ConflictError, GarrisonError, NotFoundError
from garrison_protocol.states import Stream


class Applications:
    """Owner thread only, but for ``table``: the API's thread reads that reference, which is swapped whole."""

    def __init__(
        self,
        *,
        database: Database,
        journal: Journal,
        wall_s: Callable[[], float],
        monotonic_s: Callable[[], float],
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Read what is stored.

        Raises:
            GarrisonError: ``database.damaged``.
        """
        self._database = database
        self._journal = journal
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._random_bytes = random_bytes
        self._used: dict[str, tuple[int, int]] = {}
        """Requests and tokens of each since the agent started."""
        self.table = ApplicationTable(tuple(_load(database)))

    def add(self, asked: AddApp) -> AddedApp:
        """Store a new application, and return it with its key, which nobody can read again.

        Raises:
            InvalidError: ``app.name_malformed`` or ``app.limit_out_of_range``.
            ConflictError: ``app.exists`` or ``app.too_many``.
        """
        check_name(asked.name)
        check_limits(
            requests_per_min=asked.requests_per_min, tokens_per_min=asked.tokens_per_min, concurrent=asked.concurrent
        )
        if self.table.find(asked.name) is not None:
            raise ConflictError(
                "app.exists",
                f"there is an application {asked.name} already",
                hint=f"for a new key or other limits remove it first: garrison-agent app remove {asked.name}",
            )
        if len(self.table.applications) >= MAX_APPLICATIONS:
            raise ConflictError(
                "app.too_many", f"there are {MAX_APPLICATIONS} applications", hint="remove those that are gone"
            )
        key = KEY_PREFIX + self._random_bytes(KEY_BYTES).hex()
        application = Application(
            name=asked.name,
            key_sha256=key_digest(key),
            created_at=int(self._wall_s()),
            models=frozenset(asked.models),
            requests_per_min=asked.requests_per_min,
            tokens_per_min=asked.tokens_per_min,
            concurrent=asked.concurrent,
            admin=asked.admin,
        )
        facts: dict[str, str | int | bool | None] = {
            "name": application.name,
            "models": ",".join(sorted(application.models)),
            "requests_per_min": application.requests_per_min,
            "tokens_per_min": application.tokens_per_min,
            "concurrent": application.concurrent,
            "admin": application.admin,
        }
        with self._database.transaction():
            self._database.connection.execute(
                "INSERT INTO app VALUES (?, ?, ?)", (application.name, application.key_sha256, _record(application))
            )
            self._journal.append(Stream.AUDIT, "app.added", facts)
        self._used.pop(asked.name, None)
        self.table = self.table.added(application)
        return AddedApp(**self.view(application), key=key)

    def remove(self, name: str) -> AppView:
        """Forget an application; its key opens nothing from now on. Return what it was.

        Raises:
            NotFoundError: ``app.unknown``.
        """
        view = self.view(self._find(name))
        with self._database.transaction():
            self._database.connection.execute("DELETE FROM app WHERE name = ?", (name,))
            self._journal.append(Stream.AUDIT, "app.removed", {"name": name})
        self.table = self.table.removed(name)
        return view

    def views(self) -> list[AppView]:
        """Return every application, without its key."""
        return [self.view(application) for application in self.table.applications]

    def show(self, name: str) -> AppView:
        """Return one application.

        Raises:
            NotFoundError: ``app.unknown``.
        """
        return self.view(self._find(name))

    def request_done(self, record: RequestRecord) -> None:
        """Charge an application for a request of its own."""
        if self.table.find(record.app) is None:
            return
        tokens = record.prompt_tokens + record.completion_tokens
        requests_before, tokens_before = self._used.get(record.app, (0, 0))
        self._used[record.app] = (requests_before + 1, tokens_before + tokens)
        self.table = self.table.spent(record.app, tokens, self._monotonic_s())

    def view(self, application: Application) -> AppView:
        """Return an application as people see it."""
        requests, tokens = self._used.get(application.name, (0, 0))
        return AppView(
            name=application.name,
            models=sorted(application.models),
            requests_per_min=application.requests_per_min,
            tokens_per_min=application.tokens_per_min,
            concurrent=application.concurrent,
            admin=application.admin,
            created_at=application.created_at,
            requests=requests,
            tokens=tokens,
        )

    def _find(self, name: str) -> Application:
        application = self.table.find(name)
        if application is None:
            known = ", ".join(one.name for one in self.table.applications)
            raise NotFoundError(
                "app.unknown",
                f"no application is called {name!r}",
                hint=f"known here: {known}" if known else "add one: garrison-agent app add NAME",
                name=name,
            )
        return application


def _record(application: Application) -> str:
    return json.dumps(
        {
            "created_at": application.created_at,
            "models": sorted(application.models),
            "requests_per_min": application.requests_per_min,
            "tokens_per_min": application.tokens_per_min,
            "concurrent": application.concurrent,
            "admin": application.admin,
        },
        separators=(",", ":"),
    )


def _load(database: Database) -> list[Application]:
    rows = database.connection.execute("SELECT name, key_sha256, record FROM app ORDER BY name").fetchall()
    applications = []
    for name, key_sha256, record in rows:
        try:
            limits = json.loads(record)
            applications.append(Application(name, key_sha256, **{**limits, "models": frozenset(limits["models"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise GarrisonError(
                "database.damaged",
                f"{database.path} holds an application that cannot be read: {name}",
                hint="was it written by a newer garrison-agent? install that again, or move the file away",
            ) from error
    return applications
