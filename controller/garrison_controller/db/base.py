"""The controller's store: one declarative base, and sessions that are exactly one transaction.

SQLite runs in WAL mode. A writing transaction takes SQLite's write lock when it begins: a transaction that reads
first and writes later would otherwise fail at once when another writer committed in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, Connection, DateTime, Dialect, Engine, MetaData, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

from garrison_protocol.errors import UnavailableError

BUSY_TIMEOUT_MS = 30_000
_READ_ONLY = "garrison_read_only"


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC ``datetime``; SQLite would drop the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return ``value`` as the database stores it.

        Raises:
            ValueError: ``value`` is naive.
        """
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a naive datetime: {value}")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return what the database stored, aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of every table. Constraint names are fixed, so that migrations can name them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        dict[str, str]: JSON,
        dict[str, int]: JSON,
        dict[str, object]: JSON,
        list[str]: JSON,
    }


class Database:
    """An engine and its transactions. Thread-safe; a session belongs to one thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sqlite = make_url(url).get_backend_name() == "sqlite"
        arguments: dict[str, object] = {"timeout": BUSY_TIMEOUT_MS / 1000} if self.sqlite else {}
        self.engine: Engine = create_engine(url, connect_args=arguments, pool_pre_ping=not self.sqlite)
        if self.sqlite:
            _prepare_sqlite(self.engine)
        self._writers = sessionmaker(self.engine, expire_on_commit=False)
        self._readers = sessionmaker(self.engine.execution_options(**{_READ_ONLY: True}), expire_on_commit=False)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Run one transaction: committed when the block ends, rolled back when it raises.

        Rows stay usable after the commit. Never nest two of these in one thread: SQLite has one write lock.

        Raises:
            UnavailableError: ``database.busy`` when another writer held the lock, or others all connections, too long.
        """
        session = self._writers()
        try:
            with session.begin():
                yield session
        except NoConnectionError as error:
            raise _busy("every connection to the database is in use") from error
        except OperationalError as error:
            if "database is locked" in str(error):
                raise _busy("another transaction holds the database") from error
            raise
        finally:
            session.close()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Run one transaction that only reads: it never waits for a writer, and nothing it changed is kept.

        Raises:
            UnavailableError: ``database.busy`` when others held all connections too long.
        """
        session = self._readers()
        try:
            yield session
        except NoConnectionError as error:
            raise _busy("every connection to the database is in use") from error
        finally:
            session.rollback()
            session.close()

    def create_all(self) -> None:
        """Create every table directly. For tests only; a real database is made by ``db.migrations.upgrade``."""
        from garrison_controller.db.tables import metadata  # noqa: PLC0415 -- tables import this module

        metadata.create_all(self.engine)

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def _busy(what: str) -> UnavailableError:
    return UnavailableError("database.busy", what, hint="try again", retryable=True)


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        # The driver must not begin transactions itself: it would do so too late (see the module's docstring).
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get(_READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
