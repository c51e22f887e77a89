"""Every table, imported so that ``metadata`` is complete (for migrations and tests)."""

from __future__ import annotations

from garrison_controller.access import tables as access
from garrison_controller.audit import tables as audit
from garrison_controller.bundles import tables as bundles
from garrison_controller.db.base import Base
from garrison_controller.devices import tables as devices
from garrison_controller.registry import tables as registry
from garrison_controller.rollouts import tables as rollouts

metadata = Base.metadata

__all__ = ["access", "audit", "bundles", "devices", "metadata", "registry", "rollouts"]
