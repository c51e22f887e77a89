"""Which build of a model a board takes, and why not the others. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from garrison_protocol.manifest import Manifest, RuntimeSpec, Variant
from garrison_protocol.messages.report import Inventory
from garrison_protocol.states import DeviceType

_CUDA = "CUDAExecutionProvider"
_GENERIC_GPU = frozenset({"WebGpuExecutionProvider", "DmlExecutionProvider", "VulkanExecutionProvider"})
"""Providers that run on any maker's GPU."""
_GENERIC_CPU = "CPUExecutionProvider"
_DEVICES = {DeviceType.CPU: "a CPU", DeviceType.GPU: "a GPU", DeviceType.NPU: "an NPU"}
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Rejected:
    """No variant can run here; the reasons for each variant, by its name."""

    reasons: Mapping[str, str]

    @property
    def message(self) -> str:
        """All reasons in one line."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())


@dataclass(frozen=True)
class VariantFit:
    """What this board makes of one variant. ``reasons`` says everything that is in its way; empty: it fits."""

    name: str
    fits: bool
    reasons: tuple[str, ...]
    chosen: bool
    memory_mb: int
    size_bytes: int


def choose_variant(
    manifest: Manifest,
    inventory: Inventory,
    memory_budget_mb: int,
    *,
    device_types: Collection[DeviceType] = (DeviceType.CPU,),
) -> Variant | Rejected:
    """Return the variant that the board should run: the first in Foundry Local's order of those that fit.

    The order is NPU, a vendor's GPU provider, CUDA, a generic GPU provider, a vendor's CPU provider, generic CPU; then
    the manifest's own. ``memory_budget_mb`` (MiB) is what one model may take. Disk is not judged here, since room can
    be made (``budget.plan_space``) and an installed variant must stay the same choice when the disk has filled up.
    """
    reasons: dict[str, str] = {}
    fitting: list[Variant] = []
    for variant in manifest.variants:
        obstacles = tuple(_obstacles(variant, inventory, memory_budget_mb, device_types))
        if obstacles:
            reasons[variant.name] = ", ".join(obstacles)
        else:
            fitting.append(variant)
    if not fitting:
        return Rejected(reasons)
    return min(fitting, key=lambda variant: _rank(variant.runtime))


def explain_variants(
    manifest: Manifest,
    inventory: Inventory,
    memory_budget_mb: int,
    *,
    device_types: Collection[DeviceType] = (DeviceType.CPU,),
) -> list[VariantFit]:
    """Return what ``choose_variant`` makes of each variant, in its order of preference, with all reasons against it."""
    choice = choose_variant(manifest, inventory, memory_budget_mb, device_types=device_types)
    fits = []
    for variant in sorted(manifest.variants, key=lambda variant: _rank(variant.runtime)):
        reasons = tuple(_obstacles(variant, inventory, memory_budget_mb, device_types))
        fits.append(
            VariantFit(
                name=variant.name,
                fits=not reasons,
                reasons=reasons,
                chosen=variant is choice,
                memory_mb=variant.memory_mb,
                size_bytes=variant.size_bytes,
            )
        )
    return fits


def _rank(runtime: RuntimeSpec) -> int:
    """Return the place in Foundry Local's order, best first. A provider that is not known as generic is a vendor's.

    Of several providers the first counts: it is the one that the variant was made for.
    """
    provider = runtime.execution_provider.partition(",")[0].strip()
    match runtime.device_type:
        case DeviceType.NPU:
            return 0
        case DeviceType.GPU:
            # llama.cpp's builds name no provider of their own; what they leave unset says nothing of a vendor.
            if provider in _GENERIC_GPU or provider == _GENERIC_CPU:
                return 3
            return 2 if provider == _CUDA else 1
        case DeviceType.CPU:
            return 5 if provider == _GENERIC_CPU else 4


def _obstacles(
    variant: Variant, inventory: Inventory, memory_budget_mb: int, device_types: Collection[DeviceType]
) -> Iterator[str]:
    needs = variant.requirements
    missing = sorted(set(needs.cpu_features) - set(inventory.cpu_features))
    if variant.runtime.engine not in inventory.engines:
        yield f"the engine {variant.runtime.engine} is not installed"
    if variant.runtime.device_type not in device_types:
        yield f"needs {_DEVICES[variant.runtime.device_type]}"
    if needs.architectures and _plain(inventory.architecture) not in {_plain(name) for name in needs.architectures}:
        yield f"is built for {', '.join(needs.architectures)}, this board is {inventory.architecture}"
    if missing:
        yield f"needs CPU features {', '.join(missing)}"
    if needs.memory_mb > inventory.memory_mb:
        yield f"needs a board with {needs.memory_mb} MiB of memory, this one has {inventory.memory_mb}"
    if variant.memory_mb > memory_budget_mb:
        yield f"takes {variant.memory_mb} MiB of memory, the budget is {memory_budget_mb}"


def _plain(architecture: str) -> str:
    return _ARCHITECTURES.get(architecture, architecture)
