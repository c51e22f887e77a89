"""Which build of a model a board takes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from garrison_protocol.manifest import Manifest, Variant
from garrison_protocol.messages.report import Inventory
from garrison_protocol.states import DeviceType

_ORDER = {DeviceType.NPU: 0, DeviceType.GPU: 1, DeviceType.CPU: 2}
"""Foundry Local's preference."""
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Rejected:
    """No variant can run here; one reason for each variant, by its name."""

    reasons: Mapping[str, str]

    @property
    def message(self) -> str:
        """All reasons in one line."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())


def choose_variant(
    manifest: Manifest,
    inventory: Inventory,
    memory_budget_mb: int,
    *,
    device_types: Collection[DeviceType] = (DeviceType.CPU,),
) -> Variant | Rejected:
    """Return the variant that the board should run: NPU before GPU before CPU, then the manifest's own order.

    ``memory_budget_mb`` (MiB) is what one model may take. Disk is not judged here, since room can be made
    (``budget.plan_space``) and an installed variant must stay the same choice when the disk has filled up.
    """
    reasons: dict[str, str] = {}
    fitting: list[Variant] = []
    for variant in manifest.variants:
        reason = _obstacle(variant, inventory, memory_budget_mb, device_types)
        if reason:
            reasons[variant.name] = reason
        else:
            fitting.append(variant)
    if not fitting:
        return Rejected(reasons)
    return min(fitting, key=lambda variant: _ORDER[variant.runtime.device_type])


def _obstacle(
    variant: Variant, inventory: Inventory, memory_budget_mb: int, device_types: Collection[DeviceType]
) -> str:
    needs = variant.requirements
    missing = sorted(set(needs.cpu_features) - set(inventory.cpu_features))
    if variant.runtime.engine not in inventory.engines:
        return f"the engine {variant.runtime.engine} is not installed"
    if variant.runtime.device_type not in device_types:
        return f"needs a {variant.runtime.device_type}"
    if needs.architectures and _plain(inventory.architecture) not in {_plain(name) for name in needs.architectures}:
        return f"is built for {', '.join(needs.architectures)}, this board is {inventory.architecture}"
    if missing:
        return f"needs CPU features {', '.join(missing)}"
    if needs.memory_mb > inventory.memory_mb:
        return f"needs a board with {needs.memory_mb} MiB of memory, this one has {inventory.memory_mb}"
    if variant.memory_mb > memory_budget_mb:
        return f"takes {variant.memory_mb} MiB of memory, the budget is {memory_budget_mb}"
    return ""


def _plain(architecture: str) -> str:
    return _ARCHITECTURES.get(architecture, architecture)
