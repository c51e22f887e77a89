"""Every select of the model registry."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.registry.tables import Package
from garrison_protocol.errors import NotFoundError
from garrison_protocol.ids import version_key


def find_package(session: Session, name: str, version: str) -> Package | None:
    """Return one version of a model, if it is published."""
    return session.get(Package, (name, version))


def get_package(session: Session, name: str, version: str) -> Package:
    """Return one version of a model.

    Raises:
        NotFoundError: ``model.not_found``.
    """
    package = find_package(session, name, version)
    if package is None:
        raise NotFoundError(
            "model.not_found",
            f"no model {name[:128]} in version {version[:64]} is published",
            hint="see `garrison model list`",
        )
    return package


def packages(session: Session, name: str | None = None) -> list[Package]:
    """Return published packages, of one model or of all, by name and then by version, newest first."""
    statement = select(Package)
    if name is not None:
        statement = statement.where(Package.name == name)
    found = sorted(session.scalars(statement), key=lambda package: version_key(package.version), reverse=True)
    return sorted(found, key=lambda package: package.name)
