"""Published model packages. Rows are only ever added: a version never changes and never disappears."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from garrison_controller.db.base import Base


class Package(Base):
    """One version of a model, as its release signers approved it."""

    __tablename__ = "package"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    manifest_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    alias: Mapped[str] = mapped_column(String(128), index=True)
    manifest: Mapped[str] = mapped_column(Text)
    """The manifest's exact text."""
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    """Bytes of all files of all variants."""
    published_at: Mapped[datetime]
    published_by: Mapped[str] = mapped_column(String(32))
    """Principal id: a rollout of this package needs another approver."""
    published_by_name: Mapped[str] = mapped_column(String(128))
    targets_version: Mapped[int]
    """The version of the metadata (targets, or its family's role) that brought it."""
