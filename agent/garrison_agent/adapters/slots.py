"""Slots in the agent's store, one JSON record per alias."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from garrison_agent.adapters.database import Database
from garrison_agent.core.slot import Slot
from garrison_protocol.errors import GarrisonError

_RECORD = TypeAdapter(Slot)


class SlotStore:
    """Loads and saves slots. Owner thread only; ``save`` joins the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> dict[str, Slot]:
        """Return every saved slot by alias.

        Raises:
            GarrisonError: ``database.damaged``; a record is unreadable.
        """
        rows = self._database.connection.execute("SELECT alias, record FROM slot ORDER BY alias").fetchall()
        try:
            return {alias: _RECORD.validate_json(record) for alias, record in rows}
        except ValidationError as error:
            raise GarrisonError(
                "database.damaged",
                f"{self._database.path} holds a slot that cannot be read",
                hint="was it written by a newer garrison-agent? install that again, or move the file away",
            ) from error

    def save(self, slot: Slot) -> None:
        """Keep ``slot`` in place of the alias's record."""
        record = _RECORD.dump_json(slot, exclude_defaults=True).decode()
        with self._database.transaction():
            self._database.connection.execute("INSERT OR REPLACE INTO slot VALUES (?, ?)", (slot.alias, record))
